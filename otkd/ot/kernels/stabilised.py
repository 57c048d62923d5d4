"""exp((f + g − C)/ε) around nearby potentials: matrix products for any ε.

For small ε, exp(−C/ε) underflows, but the density of the plan between two potentials does not.
Around these potentials, Sinkhorn's iteration consists of products:

    softmin(g)_i = f⁰_i − ε·log Σ_j exp((f⁰_i + g⁰_j − C_ij)/ε)·b_j·exp((g_j − g⁰_j)/ε).

If a sum becomes too small to be accurate, the soft minimum is computed in the log domain, and the
density is computed again around the result. Source: Schmitzer (2019), "Stabilized Sparse Scaling
Algorithms for Entropy Regularized Transport Problems".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from otkd.ot.kernels.base import (
    LARGEST_LOG_DENSITY,
    SMALLEST_LOG_WEIGHT,
    Kernel,
    ProductKernel,
    centred_weights,
    log_density,
)

_ROUNDING = 3e-5  # of a density, from the digits lost between the held potentials and these


@dataclass
class _Centre:
    """The potentials around which a kernel and its transpose are computed, and the density.

    Attributes:
        bounds: by direction, the smallest accurate sum (:meth:`StabilisedKernel._least_sum`).
    """

    f: Tensor
    g: Tensor
    density: Tensor
    bounds: dict[bool, Tensor] = field(default_factory=dict)


class StabilisedKernel(Kernel):
    """A cost ``(n, m)`` of one problem, or one for each of them, ``(B, n, m)``."""

    def __init__(
        self,
        cost: Tensor,
        epsilon: float,
        held: list[_Centre] | None = None,
        *,
        flipped: bool = False,
    ):
        super().__init__(cost, epsilon)
        self._held = [] if held is None else held  # shared by both directions
        self._flipped = flipped
        self._limit = LARGEST_LOG_DENSITY[cost.dtype]
        self._eps = torch.finfo(cost.dtype).eps
        self._furthest = _ROUNDING / self._eps

    @property
    def transposed(self) -> StabilisedKernel:
        """The transposed kernel, around the same potentials."""
        return StabilisedKernel(self.cost.mT, self.epsilon, self._held, flipped=not self._flipped)

    def rows(self, index: Tensor) -> StabilisedKernel:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        if self.cost.ndim == 2:
            return self
        held = [_Centre(c.f[index], c.g[index], c.density[index]) for c in self._held]
        return StabilisedKernel(self.cost[index], self.epsilon, held, flipped=self._flipped)

    @property
    def scales(self) -> bool:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        return True

    def alternate(
        self, f: Tensor, log_a: Tensor, log_b: Tensor, count: int, tolerance: float = 0.0
    ) -> tuple[Tensor, int]:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        following = self.softmin(self.transposed.softmin(f, log_a), log_b)
        # Steps do not grow, so the following ones need no check.
        if count > 1 and self._is_near(following - f):
            near = self._centre()
            start = following - near.f
            products = self._products(near.density)
            moved, made = products.alternate(start, log_a, log_b, count - 1, tolerance)
            if self._is_near(moved):
                return near.f + moved, made + 1
        for _ in range(count - 1):
            following = self.softmin(self.transposed.softmin(following, log_a), log_b)
        return following, count

    def average(self, f: Tensor, log_a: Tensor, count: int) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        for _ in range(count):
            f = (f + self.softmin(f, log_a)) / 2
        return f

    def softmin(self, g: Tensor, log_b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        if self._held:
            near = self._centre()
            weights, shift = centred_weights(log_b, g - near.g, self.epsilon)
            log_sums = self._products(near.density).apply(weights).log_()
            # Clamped entries are negligible compared with such a sum; NaN fails this test. A
            # potential far from the held one has lost digits.
            sound = (log_sums > self._least_sum(near, log_b)).all()
            sound &= log_sums.amax() < self._limit / 2
            if bool(sound & (shift.abs().amax() < self._furthest)):
                return near.f - self.epsilon * log_sums.add_(shift)
        return self._hold(g, log_b)

    def mean(self, f: Tensor, g: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        return self._products(self._at(f, g).density).apply(b * y)

    def mean_cost(self, f: Tensor, g: Tensor, b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        near = self._at(f, g)
        # The masses first, because a density may be as large as a cost.
        masses = near.density * b.reshape(*self.cost.shape[:-2], 1, -1)
        return (masses * self.cost).sum(-1).reshape(f.shape)

    def coupling(self, f: Tensor, g: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        plan = self._at(f, g).density * left.reshape(*self.cost.shape[:-1], 1)
        return plan.mul_(right.reshape(*self.cost.shape[:-2], 1, -1))

    def _centre(self) -> _Centre:
        held = self._held[0]
        if not self._flipped:
            return held
        return _Centre(held.g, held.f, held.density.mT, held.bounds)

    def _least_sum(self, near: _Centre, log_b: Tensor) -> Tensor:
        """Log of the smallest accurate sum, relative to the largest weight, ``(B, 1)``.

        It is at least half the limit. Weights below the smallest one are left out. Above the bound,
        what they could add (their mass and largest density, times the root of the smallest weight)
        is less than the rounding error of the sum. The bound is infinite if a density was clamped.
        """
        if self._flipped not in near.bounds:
            largest = near.density.amax(-2).log_().reshape(len(log_b), -1)
            clamped = (largest >= 0.99 * self._limit) & ~log_b.isneginf()
            added = (largest + log_b).masked_fill_(clamped, torch.inf).amax(-1, keepdim=True)
            lost = SMALLEST_LOG_WEIGHT[self.cost.dtype] / 2 - math.log(self._eps)
            near.bounds[self._flipped] = (added + lost).clamp_(min=-self._limit / 2)
        return near.bounds[self._flipped]

    def _products(self, density: Tensor) -> ProductKernel:
        return ProductKernel(self.cost, self.epsilon, density)

    def _is_near(self, moved: Tensor) -> bool:
        """Whether potentials at this distance from others, up to a constant, have accurate sums."""
        least, greatest = torch.aminmax(moved)
        return bool(greatest - least < self._limit / 2 * self.epsilon)  # NaN fails this test

    def _hold(self, g: Tensor, log_b: Tensor) -> Tensor:
        """The soft minimum in the log domain; the density is computed around it."""
        self._held.clear()
        terms = self._per_problem(g.unsqueeze(-2) - self.cost).div_(self.epsilon)
        log_sums = torch.logsumexp(terms + self._per_problem(log_b.unsqueeze(-2)), -1)
        f = (-self.epsilon * log_sums).reshape(len(g), -1)
        # f and g are cloned, because the caller owns them.
        self._keep(f.clone(), g.clone(), terms.sub_(log_sums.unsqueeze(-1)))
        return f

    def _at(self, f: Tensor, g: Tensor) -> _Centre:
        """The density between two potentials, computed exactly."""
        if self._held:
            near = self._centre()
            if near.f is f and near.g is g:
                return near
        self._held.clear()
        self._keep(f, g, self._per_problem(log_density(f, g, self.cost, self.epsilon)))
        return self._centre()

    def _keep(self, f: Tensor, g: Tensor, exponents: Tensor) -> None:
        density = exponents.clamp_(-self._limit, self._limit).exp_()
        centre = _Centre(f, g, density)
        self._held[:] = [_Centre(g, f, density.mT) if self._flipped else centre]

    def _per_problem(self, values: Tensor) -> Tensor:
        """Without the batch dimension if the cost of a single problem has none."""
        return values.squeeze(0) if self.cost.ndim == 2 else values
