"""The support that uses every token of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from otkd.costs import Cost, CostMatrices, EmbeddingCost
from otkd.costs.base import Side, same_for_all
from otkd.ot.kernels.blocked import BlockedCost, PointCost
from otkd.ot.kernels.keops import KeOpsCost, keops_works
from otkd.ot.options import Objective
from otkd.ot.problem import check_costs
from otkd.supports.base import Block, Positions, Selection, Support, check_softmax
from otkd.tensors import block_elements

LARGEST_DENSE = 16_384
"""Largest vocabulary for which a dense cost matrix is made: 1 GiB in float32."""

_BLOCK_ELEMENTS_ON_CPU = 2**22
_BLOCK_ELEMENTS_ON_DEVICE = 2**26


@dataclass(frozen=True)
class Dense(Support):
    """Every token, with one cost matrix that all positions share.

    Each iteration is a matrix product over all positions of a block. Above 16384 tokens the matrix
    is not stored: its rows are recomputed for every product, which requires a constant
    :class:`~otkd.costs.EmbeddingCost`. With ``backend="keops"`` they are recomputed inside KeOps'
    reductions, for any size. If pykeops or a compiler is missing, a warning is issued and torch
    computes the same result.

    Example:
        >>> embedding = torch.tensor([[0.0], [0.1], [3.0]])
        >>> loss = otkd.SinkhornLoss(embedding=embedding, support=otkd.supports.Dense())
        >>> loss(torch.tensor([[0.0, 4.0, 0.0]]), torch.tensor([[4.0, 0.0, 0.0]]))
        tensor(0.0024)
        >>> loss.last_report.converged
        True
    """

    backends: ClassVar[tuple[str, ...]] = ("keops",)

    def check(self, cost: Cost, n: int, m: int, objective: Objective, backend: str) -> None:
        """See :class:`Support`."""
        super().check(cost, n, m, objective, backend)
        if isinstance(cost, EmbeddingCost) and not cost.learns:
            return
        kind = f"a learnable {type(cost).__name__}" if cost.learns else type(cost).__name__
        if backend == "keops":
            raise ValueError(
                f"backend='keops' requires a constant EmbeddingCost, got {kind}: use backend='auto'"
            )
        if max(n, m) > LARGEST_DENSE:
            raise ValueError(
                f"a dense cost over {n}×{m} tokens would take {4 * n * m / 2**30:.1f} GiB. The "
                f"limit is {LARGEST_DENSE} tokens per side, except for a constant EmbeddingCost, "
                f"and this is {kind}: use otkd.supports.TopK(64)"
            )

    def select(
        self, positions: Positions, cost: Cost, objective: Objective, backend: str
    ) -> Selection:
        """See :class:`Support`."""
        n, m = positions.student.shape[-1], positions.teacher.shape[-1]
        where = {"dtype": positions.dtype, "device": positions.student.device}
        debias = objective.debias is not None
        lazy = _lazy_kind(n, m, backend, positions.student.device)
        if lazy is None:
            matrices = cost.matrices(n, m, self_terms=debias, **where)
        else:
            matrices = _lazy_costs(lazy, cast(EmbeddingCost, cost), debias, where)
        check_costs(n, m, matrices)
        return Selection(
            blocks=full_blocks(positions, matrices),
            support=repr(self),
            backend="keops" if lazy is KeOpsCost else "torch",
        )


def full_blocks(positions: Positions, costs: CostMatrices) -> Iterator[Block]:
    """The problems over all tokens; their costs are the same at every position."""
    elements = block_elements(
        positions.student.device, _BLOCK_ELEMENTS_ON_CPU, _BLOCK_ELEMENTS_ON_DEVICE
    )
    vocab = max(positions.student.shape[-1], positions.teacher.shape[-1])
    for rows in positions.blocks(max(1, elements // vocab)):
        log_q = torch.log_softmax(positions.student_block(rows), -1)
        log_p = torch.log_softmax(positions.teacher_block(rows), -1)
        for name, logs in (("student_logits", log_q), ("teacher_logits", log_p)):
            check_softmax(name, logs[:, 0].exp())  # a token without mass is in order
        yield Block(log_source=log_q, log_target=log_p, costs=costs)


def _lazy_kind(n: int, m: int, backend: str, device: torch.device) -> type[PointCost] | None:
    """The lazy cost to use in place of a matrix; None if a matrix is to be stored."""
    if backend == "keops":
        return KeOpsCost if keops_works(device) else BlockedCost
    return BlockedCost if max(n, m) > LARGEST_DENSE else None


def _lazy_costs(
    kind: type[PointCost], cost: EmbeddingCost, self_terms: bool, where: dict
) -> CostMatrices:
    """The costs between and within the sides; a single object within one vocabulary."""

    def between(rows: Side, columns: Side) -> Tensor:
        # A lazy cost stands where a matrix may.
        return cast(Tensor, kind(cost, (rows, columns), **where))

    cross = between("source", "target")
    if cost.one_vocabulary or not self_terms:
        return same_for_all(cross, self_terms)
    return CostMatrices(cross, between("source", "source"), between("target", "target"))
