"""What computing a transport loss took, for logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.ot.divergence import SolverReport


@dataclass(frozen=True, kw_only=True)
class Report(SolverReport):
    """What the solver did, and between which atoms.

    Attributes:
        support: what was transported: tokens, or the samples of a batch.
        backend: what computed the products with the kernel.
        coverage: mean over the positions of the probability mass of the tokens that take part one
            by one, on the side that has less of it; a scalar tensor, None where all tokens do.
        worst_coverage: the same at the position where it is least.
    """

    support: str = "every point"
    backend: str = "torch"
    coverage: Tensor | None = None
    worst_coverage: Tensor | None = None

    @classmethod
    def of(cls, reports: Sequence[SolverReport], **fields) -> Report:
        """One report of several: the most iterations and the largest error."""
        return cls(
            iterations=max(report.iterations for report in reports),
            marginal_error=torch.stack([report.marginal_error for report in reports]).max(),
            converged=all(report.converged for report in reports),
            **fields,
        )
