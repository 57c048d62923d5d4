"""WASD: the Sinkhorn divergence over a sparse kernel of token embeddings, in its own arithmetic.

Paper: Na et al. 2026, "Wasserstein-based Knowledge Distillation for Large Language Models" (NeurIPS
2026, arXiv 2610.07706), with the assistant distribution of AMiD.

Features: the loss `Wasd` below is a loss of otkd: mask, reduction and trainers are those of all
others. The kernel has the 8 nearest neighbours of every token by cosine of the teacher's input
embeddings, made symmetric, and nothing elsewhere; ε = 0.001, 10 iterations, weight 100, student
temperature 2. `--assistant 0.5` replaces the student by AMiD's mixture with α = −5. LoRA, resuming,
and every option of `transformers.TrainingArguments`.

Limits: trained on the answers of the data alone, as in the paper's comparison of divergences. Its
main experiment also trains on OpenWebText and on samples of the student. `otkd.SinkhornLoss` cannot
express this arithmetic: it solves until the marginals hold, while 10 iterations at this ε do not
converge, and where the kernel is the identity the loss is close to reverse KL. Its value is not a
divergence: only its gradient has a meaning. The last weights are kept. Not run on the paper's data.

    python examples/causal_lm/wasd.py --train-file data.jsonl --output-dir results/wasd

The paper's comparison of divergences with GPT-2 (32 rows on each of 4 GPUs; `--assistant 0.5` and
the student MiniLLM/init-gpt2-120M are those of its main experiment):

    torchrun --nproc-per-node 4 examples/causal_lm/wasd.py --student gpt2 \
        --teacher MiniLLM/teacher-gpt2-1.5B --train-file data/dolly/raw.jsonl --eval-rows 1000 \
        --skip-long-prompts --num-train-epochs 20 --learning-rate 1e-4 \
        --per-device-train-batch-size 32 --bf16 --output-dir results/wasd
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from recipe import Setup, messages, option, parse, prepare, refused_settings
from recipe_run import off_policy_trainer, settle, train
from torch import Tensor
from torch.nn.functional import normalize
from transformers import TrainingArguments

from otkd.checks import check_finite_rows
from otkd.losses.base import Batch, DistillationLoss
from otkd.ot.kernels.sparse import Graph
from otkd.supports.neighbour_index import nearest

EPSILON, ITERATIONS, WEIGHT, NEIGHBOURS = 0.001, 10, 100.0, 8
_BLOCK = 512  # positions that are solved at once
_SMALL, _TINY = 1e-16, torch.finfo(torch.float32).tiny


class Wasd(DistillationLoss):
    """100·Σ r·(f_pr − f_rr) with constant potentials; r is the student or AMiD's assistant.

    Args:
        embedding: ``(vocab, width)``, of the teacher.
        assistant: share λ of the teacher in r, in [0, 1); 0 is the student itself.
        alpha: of AMiD's mixture, r ∝ (λ·p^a + (1 − λ)·q^a)^(1/a) with a = (1 − α)/2; below 1.
        **common: of :class:`~otkd.losses.base.DistillationLoss`.
    """

    rescales_by_default = False

    def __init__(self, embedding: Tensor, assistant: float = 0.0, alpha: float = -5.0, **common):
        super().__init__(**common)
        if not (0 <= assistant < 1 and alpha < 1):
            raise ValueError(f"need 0 ≤ assistant < 1 and alpha < 1, got {assistant} and {alpha}")
        self.assistant, self.power = assistant, (1 - alpha) / 2
        self.graph, self.kernel = sparse_kernel(embedding)

    def per_position(self, batch: Batch) -> Tensor:
        shape = batch.student_logits.shape[:-1]
        counted = batch.counted
        if counted is None:
            counted = torch.ones(shape, dtype=torch.bool, device=batch.student_logits.device)
        theirs = self.teacher_temperature or self.temperature
        log_q = (batch.student_logits[counted].float() / self.temperature).log_softmax(-1)
        log_p = (batch.teacher_logits[counted].float() / theirs).log_softmax(-1)
        log_r = log_q
        if self.assistant:
            ours = math.log1p(-self.assistant) + self.power * log_q
            shared = torch.logaddexp(math.log(self.assistant) + self.power * log_p, ours)
            log_r = (shared / self.power).log_softmax(-1)
        r = log_r.exp()
        with torch.no_grad():
            blocks = zip(r.split(_BLOCK), log_p.exp().split(_BLOCK), strict=True)
            potentials = [self._cross(r, p) - self._within(r) for r, p in blocks]
        values = WEIGHT * (r * torch.cat(potentials)).sum(-1)
        check_finite_rows(values.detach(), "a WASD loss that is not finite")
        return values.new_zeros(shape).masked_scatter(counted, values)

    def _cross(self, r: Tensor, p: Tensor) -> Tensor:
        """ε·log u after alternating u = r/Kv and v = p/Ku, from v = p."""
        u, v = r, p
        for _ in range(ITERATIONS):
            u = r / self.graph.sums(self.kernel, v).clamp(min=_TINY)
            v = p / self.graph.sums(self.kernel, u).clamp(min=_TINY)
        return EPSILON * u.clamp(min=_TINY).log().masked_fill(r <= 0, 0.0)

    def _within(self, r: Tensor) -> Tensor:
        """ε·log a after averaging log a with −log K(r·a), from a = 1."""
        a = torch.ones_like(r)
        for _ in range(ITERATIONS):
            proposed = 1 / (self.graph.sums(self.kernel, r * a) + _SMALL)
            a = ((a + _SMALL) * (proposed + _SMALL)).sqrt()
        return EPSILON * (a + _SMALL).log()


def sparse_kernel(embedding: Tensor) -> tuple[Graph, Tensor]:
    """Pairs of each token with itself and its nearest, either way, and exp(−C/ε) of each pair."""
    near = nearest(embedding, embedding, NEIGHBOURS + 1, "cosine").long().to(embedding.device)
    every = torch.arange(len(near), device=near.device)
    pairs = torch.stack([every.repeat_interleave(near.shape[1]), near.flatten()])
    pairs = torch.cat([pairs, pairs.flip(0), every.expand(2, -1)], 1).unique(dim=1)
    unit = normalize(embedding.float(), dim=-1)
    cosines = torch.cat([(unit[i] * unit[j]).sum(-1) for i, j in pairs.split(2**20, 1)])
    costs = (1 - cosines).masked_fill(pairs[0] == pairs[1], 0.0)
    graph, order = Graph.of(pairs[0], pairs[1], (len(near), len(near)), symmetric=True)
    return graph, (-costs[order] / EPSILON).exp()


@dataclass
class Options:
    assistant: float = option(0.0, "λ of AMiD; 0 is the student itself.")
    assistant_alpha: float = option(-5.0, "α of AMiD.")
    student_temperature: float = option(2.0, "The teacher's is 1.")


def main(argv: Sequence[str] | None = None) -> None:
    setup, options, args = parse("wasd", argv, Setup, Options, TrainingArguments)
    with messages(args.output_dir):
        materials = prepare(setup, args)
        settings = settle("wasd", args, materials, setup, options)
        embedding = materials.teacher.get_input_embeddings().weight.detach()
        with refused_settings():
            loss = Wasd(
                embedding[: materials.vocab_size],
                assistant=options.assistant,
                alpha=options.assistant_alpha,
                temperature=options.student_temperature,
                teacher_temperature=1.0,
                vocab_size=materials.vocab_size,
            )
        trainer = off_policy_trainer(materials, setup, args, loss, materials.teacher)
        train(trainer, materials, settings)


if __name__ == "__main__":
    main()
