"""WASD's objective (Na et al. 2026, arXiv 2610.07706), in its own arithmetic.

A Sinkhorn divergence over a sparse kernel of token embeddings. Its iterations stop before they
converge, and its value is not a divergence: only its gradient has a meaning. For this reason it is
an objective of studies and recipes, and not among the losses of otkd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
    offsets: Tensor
    columns: Tensor
    kernel: Tensor

    def __init__(self, embedding: Tensor, assistant: float = 0.0, alpha: float = -5.0, **common):
        super().__init__(**common)
        if not (0 <= assistant < 1 and alpha < 1):
            raise ValueError(f"need 0 ≤ assistant < 1 and alpha < 1, got {assistant} and {alpha}")
        self.assistant, self.power = assistant, (1 - alpha) / 2
        graph, kernel = _sparse_kernel(embedding)
        # Buffers move to the device of the models together with the loss.
        self.register_buffer("offsets", graph.offsets, persistent=False)
        self.register_buffer("columns", graph.columns, persistent=False)
        self.register_buffer("kernel", kernel, persistent=False)

    def _product(self, vectors: Tensor) -> Tensor:
        """K·x of every row x."""
        size = len(self.offsets) - 1
        graph = Graph((size, size), self.offsets, self.columns, symmetric=True)
        return graph.sums(self.kernel, vectors)

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
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
            u = r / self._product(v).clamp(min=_TINY)
            v = p / self._product(u).clamp(min=_TINY)
        return EPSILON * u.clamp(min=_TINY).log().masked_fill(r <= 0, 0.0)

    def _within(self, r: Tensor) -> Tensor:
        """ε·log a after averaging log a with −log K(r·a), from a = 1."""
        a = torch.ones_like(r)
        for _ in range(ITERATIONS):
            proposed = 1 / (self._product(r * a) + _SMALL)
            a = ((a + _SMALL) * (proposed + _SMALL)).sqrt()
        return EPSILON * (a + _SMALL).log()


def _sparse_kernel(embedding: Tensor) -> tuple[Graph, Tensor]:
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
