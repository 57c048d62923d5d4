"""What a solver returns."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from otkd.ot.kernels import coupling_density
from otkd.ot.problem import Problem


class ConvergenceWarning(UserWarning):
    """Sinkhorn's iterations stopped at their limit; said once a process."""


@dataclass(frozen=True)
class Solution:
    """The solution of a batch of entropic transport problems.

    Attributes:
        value: ⟨P, C⟩ + ε·KL(P‖a⊗b), evaluated at the dual, ``(*batch,)``; the only differentiable
            field, with gradients f in a, g in b and P in the cost.
        transport_cost: ⟨P, C⟩, ``(*batch,)``.
        f: source potential, ``(*batch, n)``.
        g: target potential, ``(*batch, m)``; ⟨a, f⟩ = ⟨b, g⟩. Both are defined by the soft minimum
            where there is no mass.
        marginal_error: L1 distance between a and the row sums of the plan, ``(*batch,)``; the
            column sums are exact.
        iterations: updates of both potentials, of the whole batch.
        converged: whether every ``marginal_error`` is within the tolerance.
    """

    value: Float[Tensor, "*batch"]
    transport_cost: Float[Tensor, "*batch"]
    f: Float[Tensor, "*batch n"]
    g: Float[Tensor, "*batch m"]
    marginal_error: Float[Tensor, "*batch"]
    iterations: int
    converged: bool
    _problem: Problem = field(repr=False)

    def plan(self) -> Float[Tensor, "*batch n m"]:
        """The transport plan P, built on demand; not differentiable."""
        problem = self._problem
        if not isinstance(problem.cost, Tensor):
            raise TypeError("a lazy cost has no plan in full: it would be as large as the cost")
        n, m = self.f.shape[-1], self.g.shape[-1]
        f, g = self.f.reshape(-1, n), self.g.reshape(-1, m)
        density = coupling_density(f, g, problem.cost, problem.epsilon)
        plan = density * problem.a.unsqueeze(-1) * problem.b.unsqueeze(-2)
        return plan.reshape(*self.f.shape[:-1], n, m)


_warned = False


def warn_not_converged(
    iterations: int, error: Tensor, tolerance: float, what: str = "the marginal error"
) -> None:
    """Say once a process that a solver reached its limit of iterations."""
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"Sinkhorn did not converge in {iterations} iterations: {what} is "
        f"{error.max().item():.2e}, above the tolerance {tolerance:.2e}. Raise "
        "max_iterations, epsilon or tolerance. Later cases are reported by `converged` only.",
        ConvergenceWarning,
        stacklevel=3,
    )
