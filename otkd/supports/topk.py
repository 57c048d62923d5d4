"""The heaviest tokens of each position, and one atom for all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.costs import Cost, CostMatrices
from otkd.costs.tails import mean_cost_to_all, soft_mean_cost
from otkd.ot.divergence import Options, Report, solve_divergence
from otkd.supports.base import Positions, Support
from otkd.supports.heads import HeadMasses, Heads, select_heads

_BLOCK_ELEMENTS_ON_CPU = 2**20
_BLOCK_ELEMENTS_ON_DEVICE = 2**26


@dataclass(frozen=True)
class TopK(Support):
    """The k heaviest tokens of the student and of the teacher at each position.

    Over one vocabulary both sides stand on the union of the two; over two, each on its own. All
    other tokens are one atom with the mass they have together, as far from a token as they are on
    average over the vocabulary, E_w[C(token, ·)], and from one another −ε·log E_w,w[exp(−C/ε)] with
    w uniform: it depends on no batch, so that microbatches add up. Every token of the atom has its
    potential in the gradient. Costs are computed for the chosen tokens alone.

    Args:
        k: tokens of each side; at least 1. All of them where there are no more.
        tail: with False there is no atom for the others: the head is renormalised, or (with
            ``unbalanced``) keeps the mass it has.

    Raises:
        ValueError: if ``k`` is less than 1.
    """

    k: int = 64
    tail: bool = True

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k!r}")

    def transport(
        self, positions: Positions, cost: Cost, options: Options
    ) -> tuple[Tensor, Report]:
        """See :class:`Support`."""
        sizes = positions.student.shape[-1], positions.teacher.shape[-1]
        student, teacher = select_heads(positions, self.k, shared=cost.one_vocabulary)
        a = _masses(positions.student, positions.temperature, positions, student)
        b = _masses(positions.teacher, positions.teacher_temperature, positions, teacher).detach()
        coverage = 1 - torch.maximum(a.detach()[:, -1], b[:, -1])
        if not self.tail:
            a, b = a[:, :-1], b[:, :-1]
            if options.unbalanced is None:
                a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
        values, reports = [], []
        for block in _blocks(student, teacher):
            # Repeated tokens have no mass and come last: the longest head of the block is enough.
            widths = [int(side.counts[block].max()) for side in (student, teacher)]
            x, y = (s.tokens[block, :w] for s, w in zip((student, teacher), widths, strict=True))
            matrices = self._costs(cost, x, y, sizes, options, a.dtype)
            q, p = (self._trim(s[block], w) for s, w in zip((a, b), widths, strict=True))
            solution = solve_divergence(q, p, matrices, options)
            values.append(solution.value)
            reports.append(solution.report)
        return torch.cat(values), Report.of(
            reports,
            support=repr(self),
            coverage=coverage.mean(),
            worst_coverage=coverage.min(),
        )

    def _trim(self, masses: Tensor, width: int) -> Tensor:
        if not self.tail:
            return masses[:, :width]
        return torch.cat([masses[:, :width], masses[:, -1:]], -1)

    def _costs(self, cost, student, teacher, sizes, options, dtype) -> CostMatrices:
        """The costs between the atoms of the two sides, and within each."""
        cross = self._matrix(cost, student, teacher, ("source", "target"), sizes, options, dtype)
        if not options.debias:
            return CostMatrices(cross)
        if cost.one_vocabulary:
            return CostMatrices(cross, cross, cross)
        n, m = sizes
        within_source = student, student, ("source", "source"), (n, n)
        within_target = teacher, teacher, ("target", "target"), (m, m)
        return CostMatrices(
            cross,
            self._matrix(cost, *within_source, options, dtype),
            self._matrix(cost, *within_target, options, dtype),
        )

    def _matrix(self, cost, x, y, sides, sizes, options, dtype) -> Tensor:
        within = cost.between(x, y, sides, dtype)
        if not self.tail:
            return within
        matrix = within.new_empty(len(x), x.shape[-1] + 1, y.shape[-1] + 1)
        matrix[:, :-1, :-1] = within
        matrix[:, :-1, -1] = mean_cost_to_all(cost, x, sides, sizes, dtype)
        matrix[:, -1, :-1] = mean_cost_to_all(cost, y, sides[::-1], sizes[::-1], dtype)
        matrix[:, -1, -1] = soft_mean_cost(cost, sides, sizes, options.epsilon, dtype, x.device)
        return matrix


def _masses(logits: Tensor, temperature: float, positions: Positions, heads: Heads) -> Tensor:
    return HeadMasses.apply(logits, positions.counted, heads, temperature, positions.dtype)


def _blocks(student: Heads, teacher: Heads):
    atoms = (student.tokens.shape[-1] + 1) * (teacher.tokens.shape[-1] + 1)
    on_cpu = student.tokens.device.type == "cpu"
    elements = _BLOCK_ELEMENTS_ON_CPU if on_cpu else _BLOCK_ELEMENTS_ON_DEVICE
    size = max(1, elements // atoms)
    for start in range(0, len(student.tokens), size):
        yield slice(start, start + size)
