"""The transport problem, checked and flattened to one batch dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otkd.checks import check_cost_shape
from otkd.costs import CostMatrices
from otkd.ot.kernels.base import Kernel
from otkd.ot.kernels.choice import kernel_of
from otkd.ot.kernels.lazy import LazyCost
from otkd.tensors import check_floating

MASS_TOLERANCE = 1e-3
HELD = (math.inf, math.inf)
"""The penalties of balanced transport."""


@dataclass(frozen=True)
class Marginal:
    """How a marginal of the plan is constrained: held (ρ = ∞), relaxed by ρ·KL, or free (ρ = 0).

    Attributes:
        penalty: ρ, in units of the cost.
    """

    penalty: float

    @property
    def held(self) -> bool:
        """Whether the marginal of the plan equals the masses."""
        return math.isinf(self.penalty)

    @property
    def free(self) -> bool:
        """Whether the marginal of the plan costs nothing; its potential is 0."""
        return self.penalty == 0

    def damping(self, epsilon: float) -> float:
        """The factor by which the soft minimum is multiplied, ρ/(ρ + ε)."""
        return 1.0 if self.held else self.penalty / (self.penalty + epsilon)

    def worth(self, potential: Tensor) -> Tensor:
        """The contribution to the dual of a unit of mass, −ρ·(exp(−f/ρ) − 1), or f if held."""
        if self.held or self.free:
            return potential
        return -self.penalty * torch.expm1(potential / -self.penalty)

    def worth_of(self, masses: Tensor, logs: Tensor, potential: Tensor) -> Tensor:
        """:meth:`worth` multiplied by the mass; finite also where f/ρ is far below 0."""
        if self.held or self.free:
            return masses * potential
        return self.penalty * (masses - torch.exp(logs - potential / self.penalty))

    def log_mass(self, masses: Tensor, logs: Tensor, potential: Tensor) -> Tensor:
        """Log of the mass of the optimal plan with this potential, ``(B, 1)``."""
        total = masses.sum(-1, keepdim=True)
        if self.held:
            return total.log()
        exponents = potential / -self.penalty
        excess = torch.linalg.vecdot(masses, exponents.expm1()).unsqueeze(-1) / total
        # The first is accurate for large ρ, the second for a mass near 0.
        little = (exponents + logs).logsumexp(-1, keepdim=True)
        return torch.where(excess.abs() < 0.5, total.log() + excess.log1p(), little)

    def optimal_log_ratio(self, potential: Tensor, log_ratio: Tensor) -> Tensor:
        """The log of the plan's marginal over the mass at the optimum, from its current value.

        It is −f/ρ, or 0 if the marginal is held. A free marginal is optimal as it is.
        """
        if self.free:
            return log_ratio
        if self.held:
            return torch.zeros_like(potential)
        return potential / -self.penalty


@dataclass(frozen=True)
class Problem:
    """B problems: min over P ≥ 0 with marginals a, b of ⟨P, C⟩ + ε·KL(P‖a⊗b).

    For a relaxed side (finite ρ), the constraint is replaced by ρ·KL(P1‖a) or ρ·KL(Pᵀ1‖b).

    Attributes:
        a: source masses, ``(B, n)``.
        b: target masses, ``(B, m)``.
        cost: ``(n, m)``, shared by the problems, or ``(B, n, m)``; or a shared lazy cost.
        epsilon: strength of the entropic regularisation, in units of the cost.
        symmetric: a = b and the cost is symmetric, so that f = g.
        penalties: ρ of the source and of the target, in units of the cost: infinite for a side
            that is held, 0 for one that is free.
        log_a: logarithms of the source masses, ``(B, n)``, if they are known. The value is then
            differentiable in them and not in a: they have digits where a mass underflows, and the
            gradient in them stays small where the gradient in a tiny mass is huge.
        log_b: those of the target masses, ``(B, m)``; a constant.
    """

    a: Tensor
    b: Tensor
    cost: Tensor | LazyCost
    epsilon: float
    symmetric: bool = False
    penalties: tuple[float, float] = HELD
    log_a: Tensor | None = None
    log_b: Tensor | None = None

    def kernel(self) -> Kernel:
        """The kernel exp(−C/ε) of the costs."""
        return kernel_of(self.cost, self.epsilon, problems=len(self.a))

    @property
    def largest_cost(self) -> float:
        """An upper bound of |C|."""
        return (
            self.cost.largest() if isinstance(self.cost, LazyCost) else self.cost.abs().max().item()
        )

    @property
    def cost_inputs(self) -> tuple[Tensor, ...]:
        """The tensors that the cost's gradient flows to: the cost, or the inputs of a lazy cost."""
        return self.cost.inputs if isinstance(self.cost, LazyCost) else (self.cost,)

    @property
    def source(self) -> Marginal:
        """The constraint on the marginal a."""
        return Marginal(self.penalties[0])

    @property
    def target(self) -> Marginal:
        """The constraint on the marginal b."""
        return Marginal(self.penalties[1])

    @property
    def balanced(self) -> bool:
        """Whether both marginals are held."""
        return self.source.held and self.target.held

    def detached(self) -> Problem:
        """The same problem without its autograd history."""
        parts = {name: getattr(self, name) for name in ("a", "b", "cost", "log_a", "log_b")}
        return replace(self, **{k: None if x is None else x.detach() for k, x in parts.items()})

    def log_masses(self) -> tuple[Tensor, Tensor]:
        """The logarithms of a and b; −∞ at points without mass."""
        log_a = self.a.log() if self.log_a is None else self.log_a
        if self.symmetric:
            return log_a, log_a
        return log_a, self.b.log() if self.log_b is None else self.log_b


def check_masses(a: Tensor, b: Tensor) -> None:
    """Check the masses of a caller, ``a (*batch, n)`` and ``b (*batch, m)``.

    Raises:
        TypeError: if either is not a floating-point tensor.
        ValueError: if a mass is negative or not finite, or the masses of a problem do not add up
            to 1 within 1e-3.
    """
    for name, masses in (("a", a), ("b", b)):
        check_floating(name, masses)
        if masses.ndim < 1 or masses.shape[-1] == 0:
            raise ValueError(f"{name} must have shape (*batch, size), got {tuple(masses.shape)}")
        _check_distribution(name, masses.detach())


def check_costs(n: int, m: int, costs: CostMatrices) -> None:
    """Check the costs between and within the sides of problems of size n and m.

    Raises:
        TypeError: if any is not a floating-point tensor.
        ValueError: if any has another size or holds a number that is not finite.
    """
    seen: list[Tensor] = []
    for cost, size in zip(costs, ((n, m), (n, n), (m, m)), strict=True):
        if cost is None or isinstance(cost, LazyCost) or any(cost is other for other in seen):
            continue  # within one vocabulary all three are the same matrix
        seen.append(cost)
        check_floating("cost", cost)
        check_cost_shape(cost, *size)
        if cost.numel() and not _range(cost.detach()).isfinite():  # also false for NaN
            raise ValueError(
                "cost must hold only finite numbers whose differences are also finite in "
                f"{str(cost.dtype).removeprefix('torch.')}"
            )


def _range(cost: Tensor) -> Tensor:
    least, greatest = torch.aminmax(cost)
    return greatest - least


def flatten_problem(
    a: Tensor, b: Tensor, cost: Tensor | LazyCost, batch: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor | LazyCost, tuple[int, ...]]:
    """Convert masses and cost to one batch dimension and one floating dtype of at least float32.

    Returns:
        ``a (B, n)``, ``b (B, m)``, ``cost (n, m)`` or ``(B, n, m)``, and the shape of the batch
        (which is ``batch`` if a and b are already flat).

    Raises:
        ValueError: if the batch shapes do not broadcast.
    """
    n, m = a.shape[-1], b.shape[-1]
    if not batch:
        batch = _common_shape(a, b, cost)
        a, b = a.expand(*batch, n), b.expand(*batch, m)
    dtype = torch.float32
    for tensor in (a, b, cost):
        dtype = torch.promote_types(dtype, tensor.dtype)
    size = math.prod(batch)
    flat_cost = cost
    if isinstance(cost, Tensor):
        flat_cost = cost.to(dtype)
        if cost.ndim > 2:
            flat_cost = flat_cost.expand(*batch, n, m).reshape(size, n, m)
    a, b = _masses_in(dtype, a).reshape(size, n), _masses_in(dtype, b).reshape(size, m)
    return a, b, flat_cost, batch


def _masses_in(dtype: torch.dtype, masses: Tensor) -> Tensor:
    converted = masses.to(dtype)
    if masses.element_size() < 4:
        # In low precision the two sides have different totals, and no plan has both marginals.
        converted = converted / converted.detach().sum(-1, keepdim=True)
    return converted


def _common_shape(a: Tensor, b: Tensor, cost: Tensor | LazyCost) -> tuple[int, ...]:
    shapes = [tuple(a.shape[:-1]), tuple(b.shape[:-1]), tuple(cost.shape[:-2])]
    if shapes[0] == shapes[1] == shapes[2]:  # the usual case
        return shapes[0]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(
            "the batch shapes do not fit: "
            f"a {tuple(a.shape)}, b {tuple(b.shape)}, cost {tuple(cost.shape)}"
        ) from None


def _check_distribution(name: str, masses: Tensor) -> None:
    if not (masses.isfinite().all() and (masses >= 0).all()):
        raise ValueError(f"{name} must hold finite masses of at least 0")
    total = masses.sum(-1)
    if ((total - 1).abs() > MASS_TOLERANCE).any():
        raise ValueError(
            f"the masses of {name} must add up to 1, got sums between "
            f"{total.min().item():.6g} and {total.max().item():.6g}"
        )
