"""Every token of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.costs import Cost
from otkd.ot.divergence import Options, Report, solve_divergence
from otkd.ot.problem import check_costs
from otkd.supports.base import Positions, Support, check_softmax

LARGEST_DENSE = 16_384
"""Largest vocabulary for which a dense cost matrix is made: 1 GiB in float32."""

_BLOCK_ELEMENTS_ON_CPU = 2**22
_BLOCK_ELEMENTS_ON_DEVICE = 2**26


@dataclass(frozen=True)
class Dense(Support):
    """Every token, with the whole cost matrix in memory, shared by all positions.

    Each iteration is a matrix product over all positions of a block at once.
    """

    def check(self, cost: Cost, n: int, m: int, options: Options) -> None:
        """See :class:`Support`."""
        super().check(cost, n, m, options)
        if max(n, m) > LARGEST_DENSE:
            raise ValueError(
                f"a dense cost over {n}×{m} tokens would take {4 * n * m / 2**30:.1f} GiB; the "
                f"limit is {LARGEST_DENSE} tokens a side: use otkd.supports.TopK(64)"
            )

    def transport(
        self, positions: Positions, cost: Cost, options: Options
    ) -> tuple[Tensor, Report]:
        """See :class:`Support`."""
        n, m = positions.student.shape[-1], positions.teacher.shape[-1]
        matrices = cost.matrices(
            n,
            m,
            dtype=positions.dtype,
            device=positions.student.device,
            self_terms=options.debias,
        )
        check_costs(n, m, matrices)
        on_cpu = positions.student.device.type == "cpu"
        elements = _BLOCK_ELEMENTS_ON_CPU if on_cpu else _BLOCK_ELEMENTS_ON_DEVICE
        values, reports = [], []
        for rows in positions.blocks(max(1, elements // max(n, m))):
            q = torch.softmax(positions.student_block(rows), -1)
            p = torch.softmax(positions.teacher_block(rows), -1)
            check_softmax("student_logits", q[:, 0])
            check_softmax("teacher_logits", p[:, 0])
            solution = solve_divergence(q, p, matrices, options)
            values.append(solution.value)
            reports.append(solution.report)
        return torch.cat(values), Report.of(reports, support=repr(self))
