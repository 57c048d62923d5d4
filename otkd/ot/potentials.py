"""The result of the iterations: dual potentials and their error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_LOG_RATIO = {torch.float32: 88.0, torch.float64: 709.0}
"""Largest logarithm of a ratio of masses whose exponential is finite."""


@dataclass(frozen=True)
class Potentials:
    """Dual potentials and their distance from the optimum.

    Attributes:
        f, g: ``(B, n)``, ``(B, m)``; for balanced problems ⟨a, f⟩ = ⟨b, g⟩.
        log_rows: ``log Σ_j b_j·E_ij`` with E the density of the plan against a⊗b, ``(B, n)``. It is
            0 where the row sum of the plan is the mass of a.
        marginal_error: L1 distance between the row sums of the plan and those of the optimum,
            ``(B,)``. The column sums are exact or, for symmetric problems, have the same error.
        iterations: number of updates of both potentials.
        converged: whether every marginal error is within the tolerance.
    """

    f: Tensor
    g: Tensor
    log_rows: Tensor
    marginal_error: Tensor
    iterations: int
    converged: bool

    @property
    def row_excess(self) -> Tensor:
        """``Σ_j b_j·E_ij − 1``: what the row sums of the plan exceed the masses by, over these."""
        return excess_of(self.log_rows)


def excess_of(log_ratio: Tensor) -> Tensor:
    """The ratio minus 1, from its logarithm; finite."""
    return log_ratio.clamp(max=LARGEST_LOG_RATIO[log_ratio.dtype]).expm1_()
