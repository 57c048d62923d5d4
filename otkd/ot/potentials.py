"""The result of the iterations: dual potentials and their error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Potentials:
    """Dual potentials and their distance from the optimum.

    Attributes:
        f, g: ``(B, n)``, ``(B, m)``; for balanced problems ⟨a, f⟩ = ⟨b, g⟩.
        row_excess: ``Σ_j b_j·E_ij − 1`` with E the density of the plan against a⊗b, ``(B, n)``. It
            is 0 where the row sum of the plan is the mass of a.
        marginal_error: L1 distance between the row sums of the plan and those of the optimum,
            ``(B,)``. The column sums are exact or, for symmetric problems, have the same error.
        iterations: number of updates of both potentials.
        converged: whether every marginal error is within the tolerance.
    """

    f: Tensor
    g: Tensor
    row_excess: Tensor
    marginal_error: Tensor
    iterations: int
    converged: bool
