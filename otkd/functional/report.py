"""The report of a transport loss, for logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.ot.divergence import SolverReport


@dataclass(frozen=True, kw_only=True)
class Report(SolverReport):
    """What the solver did, and for which atoms.

    Attributes:
        support: what was transported: tokens, or the samples of a batch.
        backend: what computed the products with the kernel.
        coverage: probability mass of the tokens that are atoms of their own, on the side where it
            is smaller, as a mean over positions; a scalar tensor, or None if all tokens are.
        worst_coverage: the minimum of the same over positions.
    """

    support: str = "every point"
    backend: str = "torch"
    coverage: Tensor | None = None
    worst_coverage: Tensor | None = None

    @classmethod
    def of(cls, reports: Sequence[SolverReport], **fields) -> Report:
        """One report for several: the largest number of iterations and the largest error."""
        return cls(
            iterations=max(report.iterations for report in reports),
            marginal_error=torch.stack([report.marginal_error for report in reports]).max(),
            converged=all(report.converged for report in reports),
            **fields,
        )
