"""Distil from a teacher with another tokenizer: transport between two vocabularies.

The student writes byte-level BPE, the teacher WordPiece. The tokens that both have bring the
student's embedding into the teacher's space; distances there are the cost.

    python examples/two_vocabularies.py
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import otkd
from otkd.alignment import align_embeddings, shared_tokens

SENTENCES = [
    "the teacher reads the old book by the sea",
    "the student reads what the teacher wrote, and writes it again",
    "an old sea captain wrote a book about the weather at sea",
    "the weather turned, the captain turned the ship, and the ship reached the town",
    "in the town the student and the captain read about the weather",
]


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=160, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def main() -> None:
    torch.manual_seed(0)
    student_tokenizer, teacher_tokenizer = byte_level_tokenizer(), wordpiece_tokenizer()
    shared = shared_tokens(student_tokenizer, teacher_tokenizer)
    words = ", ".join(repr(text) for text in shared.strings if len(text) > 3)
    print(f"shared tokens: {len(shared)}, such as {words}")

    # Stand-ins for student.get_input_embeddings().weight and the teacher's: trained models agree
    # about the tokens they share, up to a rotation and some noise.
    student_width, teacher_width = 8, 12
    student_size, teacher_size = (
        tokenizer.get_vocab_size() for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    student_embedding = torch.randn(student_size, student_width)
    teacher_embedding = torch.randn(teacher_size, teacher_width)
    rotation = torch.linalg.qr(torch.randn(teacher_width, teacher_width))[0][:student_width]
    images = student_embedding[shared.student] @ rotation
    teacher_embedding[shared.teacher] = images + 0.2 * torch.randn_like(images)

    mapped, anchor_map = align_embeddings(
        student_embedding, teacher_embedding, student_tokenizer, teacher_tokenizer
    )
    print(f"residual on held-out anchors: {anchor_map.residual:.2f}")

    loss = otkd.SinkhornLoss(otkd.costs.EmbeddingCost(mapped, teacher_embedding))
    hidden = torch.randn(32, student_width)
    teacher_logits = 2 * (hidden @ rotation) @ teacher_embedding.T
    student = torch.nn.Linear(student_width, student_size)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.3)
    before = loss(student(hidden), teacher_logits)
    before.backward()
    optimizer.step()
    after = loss(student(hidden), teacher_logits)
    print(f"loss before and after a step: {before.item():.4f} -> {after.item():.4f}")


if __name__ == "__main__":
    main()
