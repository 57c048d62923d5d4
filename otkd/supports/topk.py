"""The heaviest tokens of each position, and one atom for all others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from otkd.costs import Cost, CostMatrices, EmbeddingCost
from otkd.costs.base import Side
from otkd.costs.clusters import (
    Clusters,
    clusters_of,
    mean_cost_to_clusters,
    soft_mean_cost_of_clusters,
)
from otkd.costs.tails import mean_cost_to_all, soft_mean_cost
from otkd.ot.divergence import Report, solve_divergence
from otkd.ot.options import Options
from otkd.ot.problem import check_costs
from otkd.scalars import as_flag, as_whole, settle
from otkd.supports.base import Atoms, Positions, Support
from otkd.supports.coverage import warn_of_coverage
from otkd.supports.heads import HeadMasses, Heads, select_heads
from otkd.supports.on_chip import check_on_chip, solve_on_chip
from otkd.supports.stored import solve_self_term, stored_masses, stored_self_values
from otkd.teachers import TopKTeacher
from otkd.teachers.atoms import same_up_to_rounding
from otkd.teachers.self_term import SelfTermSettings

_BLOCK_ELEMENTS_ON_CPU = 2**22
_BLOCK_ELEMENTS_ON_DEVICE = 2**26
_GATHERED_ELEMENTS = 2**20  # of embeddings and their costs at a time, a share of a block


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
        clusters: atoms that the others are divided into, by k-means of the embedding. More than 1
            pay where the embedding has clusters, and need an :class:`~otkd.costs.EmbeddingCost` and
            logits, not a stored teacher.

    Raises:
        TypeError: if ``k`` or ``clusters`` is no whole number, or ``tail`` neither True nor False.
        ValueError: if ``k`` or ``clusters`` is less than 1, or ``clusters`` are asked of no tail.
    """

    backends: ClassVar[tuple[str, ...]] = ("triton",)
    reads_stored: ClassVar[bool] = True

    k: int = 64
    _: KW_ONLY
    tail: bool = True
    clusters: int = 1

    def __post_init__(self) -> None:
        settle(
            self,
            k=as_whole("k", self.k),
            tail=as_flag("tail", self.tail),
            clusters=as_whole("clusters", self.clusters),
        )
        if self.clusters > 1 and not self.tail:
            raise ValueError(
                f"clusters={self.clusters} divide the tail, which tail=False drops: leave out one "
                "of the two"
            )

    def check(self, cost: Cost, n: int, m: int, options: Options) -> None:
        """See :class:`Support`."""
        super().check(cost, n, m, options)
        if self.clusters > 1 and not isinstance(cost, EmbeddingCost):
            raise ValueError(
                f"clusters={self.clusters} are those of an embedding: use an EmbeddingCost, or "
                f"clusters=1 for {type(cost).__name__}"
            )
        if options.backend == "triton":
            if not self.tail or self.clusters > 1:
                raise ValueError(f"backend='triton' computes TopK({self.k}), got {self!r}")
            check_on_chip(cost, options)

    def transport(
        self, positions: Positions, cost: Cost, options: Options
    ) -> tuple[Tensor, Report]:
        """See :class:`Support`."""
        sizes = positions.student.shape[-1], positions.teacher.shape[-1]
        (student, a), (teacher, b) = self._heads(positions, cost)
        heads = student.tokens.shape[-1], teacher.tokens.shape[-1]
        rests = (s.detach()[:, k:].sum(-1) for s, k in zip((a, b), heads, strict=True))
        coverage = 1 - torch.maximum(*rests)
        a, b = (self._marginal(s, k, options) for s, k in zip((a, b), heads, strict=True))
        self_values = self._stored_self_values(positions, cost, options)
        settings = {
            "support": repr(self),
            "coverage": coverage.mean(),
            "worst_coverage": coverage.min(),
        }
        if self.tail:
            warn_of_coverage(settings["coverage"], self.k)
        if options.backend == "triton":
            value, report = solve_on_chip(
                a, b, student, cast(EmbeddingCost, cost), options, sizes[0]
            )
            return value, Report.of([report], backend="triton", **settings)
        values, reports = [], []
        # Repeated tokens have no mass and come last: the longest head of a block is enough for it,
        # and positions whose heads are about as long make a block.
        order = (student.counts + teacher.counts).argsort()
        for block in _blocks(order, heads):
            widths = [int(side.counts[block].max()) for side in (student, teacher)]
            x, y = (s.tokens[block, :w] for s, w in zip((student, teacher), widths, strict=True))
            if student.tokens is teacher.tokens:
                y = x
            matrices = self._costs(cost, x, y, sizes, options, a.dtype)
            q, p = (
                self._trim(masses[block], head, width)
                for masses, head, width in zip((a, b), heads, widths, strict=True)
            )
            if cost.learns:  # constants were checked when they were given
                check_costs(q.shape[-1], p.shape[-1], matrices)
            known = None if self_values is None else self_values[block]
            solution = solve_divergence(q, p, matrices, options, target_value=known)
            values.append(solution.value)
            reports.append(solution.report)
        return torch.cat(values)[order.argsort()], Report.of(reports, **settings)

    def atoms(self, positions: Positions, cost: Cost, options: Options) -> Atoms:
        """See :class:`Support`."""
        sizes = positions.student.shape[-1], positions.teacher.shape[-1]
        masses, tokens = [], []
        for heads, side in self._heads(positions, cost):
            width = int(heads.counts[0])
            head = heads.tokens.shape[-1]
            masses.append(self._trim(self._marginal(side.detach(), head, options), head, width)[0])
            tokens.append(heads.tokens[:, :width])
        x, y = tokens
        matrix = self._matrix(cost, x, y, ("source", "target"), sizes, options, positions.dtype)[0]
        for place, masses_of_side in enumerate(masses):
            others = len(masses_of_side) - tokens[place].shape[-1]
            numbers = torch.arange(-1, -1 - others, -1, device=matrix.device)
            tokens[place] = torch.cat([tokens[place], numbers.unsqueeze(0)], -1)
        return Atoms(masses[0], masses[1], matrix, tokens[0][0], tokens[1][0])

    def _heads(self, positions: Positions, cost: Cost) -> tuple[tuple[Heads, Tensor], ...]:
        """The tokens of both sides with their masses and, last, that of all others."""
        student, teacher = select_heads(positions, self.k, shared=cost.one_vocabulary)
        counted, dtype, device = positions.counted, positions.dtype, positions.student.device
        clusters = self._clusters(cost, "source", device)
        a = HeadMasses.apply(
            positions.student, counted, student, clusters, positions.temperature, dtype
        )
        if positions.stored is None:
            clusters = self._clusters(cost, "target", device)
            b = HeadMasses.apply(
                positions.teacher, counted, teacher, clusters, positions.teacher_temperature, dtype
            )
        else:
            if self.clusters > 1:
                raise ValueError("a stored teacher knows its left-over mass as one: use clusters=1")
            stored = positions.counted_stored()
            b = stored_masses(stored, teacher, positions.dtype)
            if cost.one_vocabulary:
                same = same_up_to_rounding(a.detach(), b, b.log(), stored.log_masses.dtype)
                b = torch.where(same, a.detach(), b)
        return (student, a), (teacher, b.detach())

    def stored_self_term(
        self, teacher: TopKTeacher, cost: Cost, options: Options
    ) -> tuple[Tensor, SelfTermSettings]:
        """See :func:`otkd.supports.stored.solve_self_term`."""
        return solve_self_term(teacher, cost, self, options)

    def _stored_self_values(self, positions, cost, options) -> Tensor | None:
        if positions.stored is None:
            return None
        stored = positions.counted_stored()
        return stored_self_values(stored, cost, self, options, positions.dtype)

    def _marginal(self, masses: Tensor, head: int, options: Options) -> Tensor:
        if self.tail:
            return masses
        masses = masses[:, :head]
        return masses if options.unbalanced is not None else masses / masses.sum(-1, keepdim=True)

    def _trim(self, masses: Tensor, head: int, width: int) -> Tensor:
        return torch.cat([masses[:, :width], masses[:, head:]], -1)

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
        k, m = x.shape[-1], y.shape[-1]
        if not self.tail:
            return cost.between(x, y, sides, dtype)
        to_tail, from_tail, corner = self._tail_costs(cost, x, y, sides, sizes, options, dtype)
        matrix = to_tail.new_empty(len(x), k + from_tail.shape[-1], m + to_tail.shape[-1])
        size = max(1, _GATHERED_ELEMENTS // (max(k, m) * (cost.width + m)))
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            part = x[rows]
            matrix[rows, :k, :m] = cost.between(part, part if y is x else y[rows], sides, dtype)
        matrix[:, :k, m:] = to_tail
        matrix[:, k:, :m] = from_tail.mT
        matrix[:, k:, m:] = corner
        return matrix

    def _tail_costs(self, cost, x, y, sides, sizes, options, dtype) -> tuple[Tensor, ...]:
        """From x to the tail of the second side, from y to that of the first, and between both."""
        if self.clusters == 1:
            return (
                mean_cost_to_all(cost, x, sides, sizes, dtype).unsqueeze(-1),
                mean_cost_to_all(cost, y, sides[::-1], sizes[::-1], dtype).unsqueeze(-1),
                soft_mean_cost(cost, sides, sizes, options.epsilon, dtype, x.device),
            )
        first, second = (clusters_of(cost, side, self.clusters, x.device) for side in sides)
        both = (first, second)
        return (
            mean_cost_to_clusters(cost, x, sides, second, dtype),
            mean_cost_to_clusters(cost, y, sides[::-1], first, dtype),
            soft_mean_cost_of_clusters(cost, sides, both, options.epsilon, dtype, x.device),
        )

    def _clusters(self, cost: Cost, side: Side, device: torch.device) -> Clusters | None:
        if self.clusters == 1 or not self.tail:
            return None
        return clusters_of(cast(EmbeddingCost, cost), side, self.clusters, device)


def _blocks(order: Tensor, heads: tuple[int, int]) -> Iterator[Tensor]:
    """Positions in this order, in blocks of about one size."""
    elements = _BLOCK_ELEMENTS_ON_CPU if order.device.type == "cpu" else _BLOCK_ELEMENTS_ON_DEVICE
    atoms = (heads[0] + 1) * (heads[1] + 1)
    count = -(-len(order) * atoms // elements)
    yield from order.split(-(-len(order) // max(1, min(count, len(order)))))
