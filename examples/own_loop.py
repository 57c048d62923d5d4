"""A training loop of your own, with transport over a small vocabulary beside KL.

The teacher spreads its mass over tokens that mean nearly the same. A student that cannot tell them
apart is punished by KL for choosing another of them, and hardly by transport.

    python examples/own_loop.py
"""

import torch

import otkd


def main() -> None:
    torch.manual_seed(0)
    vocab, width, positions = 60, 16, 64
    meanings = torch.randn(6, width)
    embedding = meanings.repeat_interleave(10, 0) + 0.1 * torch.randn(vocab, width)
    hidden = torch.randn(positions, width)
    teacher_logits = 2 * hidden @ embedding.T

    losses = {
        "kl": otkd.KLLoss(),
        "sinkhorn": otkd.SinkhornLoss(cost="embedding", embedding=embedding, epsilon=0.3),
    }
    for name, loss in losses.items():
        torch.manual_seed(1)
        student = torch.nn.Sequential(torch.nn.Linear(width, 4), torch.nn.Linear(4, vocab))
        optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
        for _ in range(50):
            optimizer.zero_grad()
            loss(student(hidden), teacher_logits).backward()
            optimizer.step()
        with torch.no_grad():
            logits = student(hidden)
            scores = {other: losses[other](logits, teacher_logits).item() for other in losses}
        print(f"trained with {name:8}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))


if __name__ == "__main__":
    main()
