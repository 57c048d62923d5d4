"""What a solver returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from otkd.warn import warn_caller

if TYPE_CHECKING:
    from otkd.ot.options import Options


_FEW = 8


class ConvergenceWarning(UserWarning):
    """The solver stopped at its limit of iterations.

    The text names the problem by its sizes and settings alone, so that Python's filters decide how
    often it is shown: by default once for each place and text, and another problem is told anew.
    """


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
    _transport: Any = field(repr=False)  # a Transport, whose module imports this one

    def plan(self) -> Float[Tensor, "*batch n m"]:
        """The transport plan P, built on demand; not differentiable."""
        return self._transport.plan().reshape(*self.f.shape, self.g.shape[-1])


def warn_not_converged(
    a: Tensor, b: Tensor, options: Options, what: str = "the potentials"
) -> None:
    """Tell the caller of otkd that problems with masses ``a (B, n)``, ``b (B, m)`` are unsolved."""
    warn_caller(
        f"Sinkhorn did not converge in {options.max_iterations} iterations: {what} of transport "
        f"between {_about(a)} and {_about(b)} points at epsilon={options.epsilon:g} "
        f"were not found within the tolerance {options.tolerance:g}. The result is the best that "
        "was found: see `converged` and `marginal_error`. Raise max_iterations, epsilon or "
        "tolerance",
        ConvergenceWarning,
    )


def _about(masses: Tensor) -> str:
    """Their number; of many the next power of 2, as it may differ in every step of a training."""
    size = masses.shape[-1]
    return str(size) if size <= _FEW else f"up to {1 << (size - 1).bit_length()}"
