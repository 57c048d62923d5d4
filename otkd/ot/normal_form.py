"""The normal form of a problem: costs from 0 up, and masses that add up to 1.

Adding a constant to the cost does not change the plan of balanced transport, and only scales the
plan of relaxed transport. Multiplying the masses of a side has a similar effect. Both effects are
known in closed form. Let c be the least cost of a problem, α and β the total masses of its sides,
C' = C − c, a' = a/α, b' = b/β, and

    S = ε + ρ_a + ρ_b,   w_a = ρ_a/S,   w_b = ρ_b/S,   h = ρ_a·ρ_b/S

(or the limits of these if a side is held, ρ = ∞). Then

    f = f' + w_a·(c − ε·log β) + h·log(α/β),    g = g' + w_b·(c − ε·log α) − h·log(α/β),
    log P = log P' + log(α·β) − w_a·log β − w_b·log α − c/S.

Substituting these into the updates f ← ρ_a/(ρ_a + ε)·softmin(g) and g ← ρ_b/(ρ_b + ε)·softmin(f)
gives the updates of f' and g'. So kernels and solver do not depend on constants and signs of the
cost or on units of mass, but only on the range of the cost divided by ε. If float32 has too few
digits for that range, the normal form is in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otkd.ot.kernels.base import Kernel, log_density
from otkd.ot.kernels.choice import dense_kernel
from otkd.ot.kernels.lazy import LazyCost
from otkd.ot.problem import Problem

_ROUNDINGS = 2  # rounding errors of C/ε that must be within the tolerance of the marginals
SMALLEST_EPSILON = 1e-11
"""Of the range of the cost: balanced problems with a smaller ε are solved with this one.

The value is the same to ε·log(n·m), and below there potentials in float64 have no digits for the
plan any more.
"""


@dataclass(frozen=True)
class Ground:
    """A cost minus the least cost of each problem, and its kernel.

    Attributes:
        cost: C', as the cost of a :class:`~otkd.ot.problem.Problem`; at least 0.
        least: c; ``(B, 1)`` if every problem has its own.
        kernel: exp(−C'/ε).
    """

    cost: Tensor | LazyCost
    least: Tensor | float
    kernel: Kernel

    @classmethod
    def of(cls, problem: Problem, tolerance: float) -> Ground:
        """The ground of a problem without autograd history, to be solved to this tolerance.

        It is in float64 if the rounding error of C/ε in float32 exceeds the tolerance.
        """
        cost, epsilon = problem.cost, problem.epsilon
        if isinstance(cost, LazyCost) or not cost.numel():  # lazy costs are distances, from 0 up
            return cls(cost, 0.0, problem.kernel())
        span, least = _span_and_least(cost)
        if problem.balanced:
            epsilon = max(epsilon, span * SMALLEST_EPSILON)
        if span / epsilon * _ROUNDINGS * torch.finfo(cost.dtype).eps > tolerance:
            cost = cost.double()
        if isinstance(least, Tensor):
            cost = cost - least.unsqueeze(-1)
        elif least != 0:
            cost = cost - least
        kernel = dense_kernel(cost, epsilon, reach=span / epsilon, single=len(problem.a) == 1)
        return cls(cost, least, kernel)


def _span_and_least(cost: Tensor) -> tuple[float, Tensor | float]:
    """The largest range of a problem's costs, and the least cost of each; 0 if it is 0 for all."""
    if cost.ndim == 2:
        least, greatest = torch.stack(torch.aminmax(cost)).tolist()
        return greatest - least, least
    least, greatest = torch.aminmax(cost.flatten(1), dim=1)
    span, furthest = torch.stack([(greatest - least).amax(), least.abs().amax()]).tolist()
    return span, least.unsqueeze(-1) if furthest > 0 else 0.0


@dataclass(frozen=True)
class NormalForm:
    """A problem in normal form, and the conversion back.

    Attributes:
        problem: with the masses a', b' and the cost C'; without autograd history.
        ground: of the cost.
        source_shift: f − f', ``(B, 1)``, or 0.
        target_shift: g − g'.
        log_mass: log P − log P' for both masses multiplied out, ``(B, 1)``, or 0.
        least_mass: the mass of P' at which P has the mass of the smaller side, ``(B,)``; None if
            the marginals are held.
    """

    problem: Problem
    ground: Ground
    source_shift: Tensor | float
    target_shift: Tensor | float
    log_mass: Tensor | float
    least_mass: Tensor | None = None

    @classmethod
    def of(
        cls, problem: Problem, ground: Ground | None = None, *, tolerance: float = 1e-4
    ) -> NormalForm:
        """The normal form of a problem that is to be solved to this tolerance."""
        problem = problem.detached()
        if ground is None:
            ground = Ground.of(problem, tolerance)
        least, dtype = ground.least, ground.cost.dtype
        total_a, a = _normalised(problem.a.to(dtype))
        total_b, b = (total_a, a) if problem.symmetric else _normalised(problem.b.to(dtype))
        epsilon = ground.kernel.epsilon
        normal = replace(
            problem,
            a=a,
            b=b,
            cost=ground.cost,
            epsilon=epsilon,
            log_a=None if problem.log_a is None else problem.log_a.to(dtype) - total_a.log(),
            log_b=None if problem.log_b is None else problem.log_b.to(dtype) - total_b.log(),
        )
        if problem.balanced:
            return cls(normal, ground, least / 2, least / 2, 0.0)
        share_a, share_b, common, inverse = _weights(problem)
        log_a, log_b = total_a.log(), total_b.log()
        log_mass = (1 - share_b) * log_a + (1 - share_a) * log_b - inverse * least
        return cls(
            normal,
            ground,
            share_a * (least - epsilon * log_b) + common * (log_a - log_b),
            share_b * (least - epsilon * log_a) - common * (log_a - log_b),
            log_mass,
            (torch.minimum(log_a, log_b) - log_mass).squeeze(-1).exp(),
        )

    def plan(self, f: Tensor, g: Tensor) -> Tensor:
        """P from potentials of the normal form, ``(B, n, m)``; not available for a lazy cost."""
        cost = self.problem.cost
        if isinstance(cost, LazyCost):
            raise TypeError(
                "the plan of a lazy cost is not available, because it would be as large as the cost"
            )
        log_a, log_b = self.problem.log_masses()
        log_masses = (log_a + self.log_mass).unsqueeze(-1) + log_b.unsqueeze(-2)
        return (log_density(f, g, cost, self.problem.epsilon) + log_masses).exp_()


def _normalised(masses: Tensor) -> tuple[Tensor, Tensor]:
    """The total of each row, ``(B, 1)``, and the row divided by it."""
    total = masses.sum(-1, keepdim=True)
    return total, masses / total


def _weights(problem: Problem) -> tuple[float, float, float, float]:
    """The weights w_a, w_b, h and 1/S of a relaxed problem."""
    source, target = problem.penalties
    if math.isinf(source):
        return 1.0, 0.0, target, 0.0
    if math.isinf(target):
        return 0.0, 1.0, source, 0.0
    total = problem.epsilon + source + target
    return source / total, target / total, source * (target / total), 1 / total
