"""The most probable tokens of each position, and one or several atoms for all others."""

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
from otkd.ot.options import Objective, SolverSettings
from otkd.ot.problem import check_costs
from otkd.scalars import as_flag, as_whole, settle
from otkd.supports.base import Block, Positions, Selection, Support
from otkd.supports.coverage import warn_of_coverage
from otkd.supports.heads import Atoms, HeadLogMasses, select_heads
from otkd.supports.on_chip import check_on_chip, on_chip_block
from otkd.supports.stored import solve_self_term, stored_masses, stored_potential
from otkd.teachers import TopKTeacher
from otkd.teachers.atoms import same_up_to_rounding
from otkd.teachers.self_term import SelfTermSettings
from otkd.tensors import block_elements

_BLOCK_ELEMENTS_ON_CPU = 2**22
_BLOCK_ELEMENTS_ON_DEVICE = 2**26
_GATHERED_ELEMENTS = 2**20  # of embeddings and their costs at a time


@dataclass(frozen=True)
class TopK(Support):
    """The k most probable tokens of the student and of the teacher at each position.

    Within one vocabulary, both sides use the union of the two sets. Between two vocabularies, the
    student also uses the token that is nearest to each of the teacher's tokens. All other tokens
    form the tail, one atom that holds their total mass. With w uniform over the vocabulary, its
    cost to a token is the mean E_w[C(token, ·)], and its cost to the tail of the other side is
    −ε·log E_w,w[exp(−C/ε)]. These do not depend on the batch, so microbatches add up. The gradient
    of every token in the tail uses the tail's potential. Costs are computed for the chosen tokens
    only. :class:`otkd.TransportKLLoss` has no tail if it is debiased, its smoothing is 1 and the
    teacher's logits are given.

    Args:
        k: tokens of each side, at least 1. All tokens are used if there are fewer.
        tail: with False the tail is dropped. The chosen tokens are then renormalised or, if the
            loss has ``marginal_relaxation``, keep their mass.
        clusters: number of atoms into which the tail is divided, by k-means of the embedding. More
            than 1 reduces the error if the embedding has clusters. It requires an
            :class:`~otkd.costs.EmbeddingCost` and a teacher that is not a stored top-k.

    Raises:
        TypeError: if ``k`` or ``clusters`` is not a whole number, or ``tail`` is not a bool.
        ValueError: if ``k`` or ``clusters`` is less than 1, or ``clusters > 1`` with
            ``tail=False``.

    Example:
        >>> embedding = torch.arange(100.0).unsqueeze(-1)
        >>> loss = otkd.SinkhornLoss(embedding=embedding, support=otkd.supports.TopK(3))
        >>> student, teacher = torch.zeros(1, 100), torch.zeros(1, 100)
        >>> student[0, 11] = teacher[0, 10] = 10.0
        >>> loss(student, teacher)
        tensor(0.0006)
        >>> print(f"{loss.last_report.coverage.item():.3f}")
        0.996
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
                f"clusters={self.clusters} has no effect with tail=False: leave out one of them"
            )

    def check(self, cost: Cost, n: int, m: int, objective: Objective, backend: str) -> None:
        """See :class:`Support`."""
        super().check(cost, n, m, objective, backend)
        if self.clusters > 1 and not isinstance(cost, EmbeddingCost):
            raise ValueError(
                f"clusters={self.clusters} requires an EmbeddingCost: use one, or clusters=1 for "
                f"{type(cost).__name__}"
            )
        if backend == "triton":
            if not self.tail or self.clusters > 1:
                raise ValueError(f"backend='triton' supports only TopK({self.k}), got {self!r}")
            check_on_chip(cost, objective)

    def select(
        self, positions: Positions, cost: Cost, objective: Objective, backend: str
    ) -> Selection:
        """See :class:`Support`."""
        student, teacher = self._atoms(positions, cost)
        coverage = 1 - torch.maximum(student.others(), teacher.others())
        if self.tail:
            warn_of_coverage(coverage.mean(), self.k)
        else:
            student, teacher = (
                side.without_others(normalize=objective.balanced) for side in (student, teacher)
            )
        if backend == "triton":
            vocab = positions.student.shape[-1]
            blocks = [on_chip_block(student, teacher, cast(EmbeddingCost, cost), vocab)]
        else:
            blocks = self._blocks(positions, student, teacher, cost, objective)
        backend = "triton" if backend == "triton" else "torch"
        return Selection(blocks=blocks, support=repr(self), backend=backend, coverage=coverage)

    def _blocks(
        self, positions: Positions, student: Atoms, teacher: Atoms, cost: Cost, objective: Objective
    ) -> Iterator[Block]:
        sizes = positions.student.shape[-1], positions.teacher.shape[-1]
        known = None
        if positions.stored is not None:
            stored = positions.counted_stored()
            known = stored_potential(stored, teacher.heads, cost, self, objective, positions.dtype)
        # Repeated tokens have no mass and come last, so a block is as wide as its longest head.
        # Sorting puts positions with heads of similar length into the same block.
        order = (student.heads.counts + teacher.heads.counts).argsort()
        for places in _in_blocks(order, student.width, teacher.width):
            (x, log_q), (y, log_p) = student.part(places), teacher.part(places)
            if student.heads.tokens is teacher.heads.tokens:
                y = x
            costs = self._costs(cost, x, y, sizes, objective, log_q.dtype)
            if cost.learns:  # constants are checked in the constructor
                check_costs(log_q.shape[-1], log_p.shape[-1], costs)
            yield Block(
                log_source=log_q,
                log_target=log_p,
                costs=costs,
                target_potential=(
                    None if known is None else teacher.columns(known, places, y.shape[-1])
                ),
                places=places,
                tokens=(x, y),
            )

    def _atoms(self, positions: Positions, cost: Cost) -> tuple[Atoms, Atoms]:
        student, teacher = select_heads(positions, self.k, cost)
        counted, dtype, device = positions.counted, positions.dtype, positions.student.device
        clusters = self._clusters(cost, "source", device)
        a = HeadLogMasses.apply(
            positions.student, counted, student, clusters, positions.temperature, dtype
        )
        if positions.stored is None:
            clusters = self._clusters(cost, "target", device)
            b = HeadLogMasses.apply(
                positions.teacher, counted, teacher, clusters, positions.teacher_temperature, dtype
            )
        else:
            if self.clusters > 1:
                raise ValueError(
                    "a stored top-k teacher keeps its tail as a single mass: use TopK(clusters=1)"
                )
            stored = positions.counted_stored()
            b = stored_masses(stored, teacher, positions.dtype).log()
            if cost.one_vocabulary:
                own = a.detach()
                same = same_up_to_rounding(own.exp(), b.exp(), b, stored.log_masses.dtype)
                b = torch.where(same, own, b)
        return Atoms(student, a), Atoms(teacher, b.detach())

    def stored_self_term(
        self, teacher: TopKTeacher, cost: Cost, objective: Objective, solver: SolverSettings
    ) -> tuple[Tensor, SelfTermSettings]:
        """See :func:`otkd.supports.stored.solve_self_term`."""
        return solve_self_term(teacher, cost, self, objective, solver)

    def _costs(self, cost, student, teacher, sizes, objective, dtype) -> CostMatrices:
        """The costs between the atoms of the two sides, and within each."""
        cross = self._matrix(cost, student, teacher, ("source", "target"), sizes, objective, dtype)
        if objective.debias is None:
            return CostMatrices(cross)
        if cost.one_vocabulary:
            return CostMatrices(cross, cross, cross)
        n, m = sizes
        within_source = student, student, ("source", "source"), (n, n)
        within_target = teacher, teacher, ("target", "target"), (m, m)
        return CostMatrices(
            cross,
            self._matrix(cost, *within_source, objective, dtype),
            self._matrix(cost, *within_target, objective, dtype),
        )

    def _matrix(self, cost, x, y, sides, sizes, objective, dtype) -> Tensor:
        k, m = x.shape[-1], y.shape[-1]
        if not self.tail:
            return cost.between(x, y, sides, dtype)
        to_tail, from_tail, corner = self._tail_costs(cost, x, y, sides, sizes, objective, dtype)
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

    def _tail_costs(self, cost, x, y, sides, sizes, objective, dtype) -> tuple[Tensor, ...]:
        """From x to the tail of the second side, from y to that of the first, and between both."""
        if self.clusters == 1:
            return (
                mean_cost_to_all(cost, x, sides, sizes, dtype).unsqueeze(-1),
                mean_cost_to_all(cost, y, sides[::-1], sizes[::-1], dtype).unsqueeze(-1),
                soft_mean_cost(cost, sides, sizes, objective.epsilon, dtype, x.device),
            )
        first, second = (clusters_of(cost, side, self.clusters, x.device) for side in sides)
        both = (first, second)
        return (
            mean_cost_to_clusters(cost, x, sides, second, dtype),
            mean_cost_to_clusters(cost, y, sides[::-1], first, dtype),
            soft_mean_cost_of_clusters(cost, sides, both, objective.epsilon, dtype, x.device),
        )

    def _clusters(self, cost: Cost, side: Side, device: torch.device) -> Clusters | None:
        if self.clusters == 1 or not self.tail:
            return None
        return clusters_of(cast(EmbeddingCost, cost), side, self.clusters, device)


def _in_blocks(order: Tensor, n: int, m: int) -> Iterator[Tensor]:
    """The positions in this order, in blocks of about equal size with n and m tokens each."""
    elements = block_elements(order.device, _BLOCK_ELEMENTS_ON_CPU, _BLOCK_ELEMENTS_ON_DEVICE)
    count = -(-len(order) * (n + 1) * (m + 1) // elements)
    yield from order.split(-(-len(order) // max(1, min(count, len(order)))))
