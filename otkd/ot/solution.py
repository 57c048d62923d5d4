"""The result of a solver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from otkd.warn import warn_caller

if TYPE_CHECKING:
    from otkd.ot.options import SolverSettings


_FEW = 8


class ConvergenceWarning(UserWarning):
    """The solver reached its limit of iterations.

    The text contains only sizes and settings of the problem, so that Python's warning filters can
    recognise it: by default it is shown once per place and text.
    """


@dataclass(frozen=True)
class Solution:
    """The solution of a batch of entropic transport problems.

    Attributes:
        value: ⟨P, C⟩ + ε·KL(P‖a⊗b), evaluated at the dual, ``(*batch,)``; with relaxed marginals
            plus their penalties. The only differentiable field: its gradients are P in the cost
            and, if the marginals are held, f in a and g in b.
        transport_cost: ⟨P, C⟩, ``(*batch,)``.
        f: source potential, ``(*batch, n)``.
        g: target potential, ``(*batch, m)``; ⟨a, f⟩ = ⟨b, g⟩ if the marginals are held. At points
            without mass, both are defined by the soft minimum.
        marginal_error: L1 distance between the row sums of the plan and those of the optimum,
            ``(*batch,)``; these are a if the marginal is held. The column sums are exact.
        iterations: updates of both potentials, for the whole batch.
        converged: whether every ``marginal_error`` is within the tolerance.

    Example:
        >>> a, b = torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.8])
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> solution = otkd.ot.sinkhorn(a, b, cost, epsilon=0.5)
        >>> solution.transport_cost, solution.converged
        (tensor(0.3115), True)
        >>> solution.plan()
        tensor([[0.1942, 0.3058],
                [0.0058, 0.4942]])
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
        """The transport plan P, computed on demand; not differentiable."""
        return self._transport.plan().reshape(*self.f.shape, self.g.shape[-1])


def warn_not_converged(
    a: Tensor, b: Tensor, epsilon: float, solver: SolverSettings, what: str = "the potentials"
) -> None:
    """Warn the caller of otkd that problems with masses ``a (B, n)``, ``b (B, m)`` are unsolved."""
    warn_caller(
        f"Sinkhorn did not converge in {solver.max_iterations} iterations: {what} of transport "
        f"between {_about(a)} and {_about(b)} points at epsilon={epsilon:g} "
        f"were not found within the tolerance {solver.tolerance:g}. The result is the best that "
        "was found: see `converged` and `marginal_error`. Raise max_iterations, epsilon or "
        "tolerance",
        ConvergenceWarning,
    )


def _about(masses: Tensor) -> str:
    """The number of points; if large, the next power of 2.

    It may differ in every training step, and each new text would be shown as a new warning.
    """
    size = masses.shape[-1]
    return str(size) if size <= _FEW else f"up to {1 << (size - 1).bit_length()}"
