"""exp(−C/ε) close to 1, for large ε or tiny costs.

All entries of K, and sums with them, are 1 up to the last few bits, and −ε·log of such a sum has an
error of ε times the rounding of 1, which may exceed all costs. The differences of K and of the
weights from 1 are accurate. With masses that add up to 1,

    softmin(g)_i = −ε·log1p(Σ_j b_j·expm1(g_j/ε) + Σ_j b_j·exp(g_j/ε)·expm1(−C_ij/ε)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from otkd.ot.kernels.base import ProductKernel, products

LARGEST_FLAT_REACH = 0.25
"""Of C/ε: from here on the rounding of 1 is little beside what the solver's tolerance allows."""


class FlatKernel(ProductKernel):
    """A :class:`~otkd.ot.kernels.base.ProductKernel` of costs within ``reach``·ε of 0."""

    def __init__(self, cost: Tensor, epsilon: float, reach: float, departure: Tensor | None = None):
        self._departure = torch.expm1(cost / -epsilon) if departure is None else departure
        super().__init__(cost, epsilon, self._departure + 1)
        self._reach = reach

    @property
    def reach(self) -> float:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        return self._reach

    @property
    def transposed(self) -> FlatKernel:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        return FlatKernel(self.cost.mT, self.epsilon, self.reach, self._departure.mT)

    def rows(self, index: Tensor) -> FlatKernel:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        if self.cost.ndim == 2:
            return self
        return FlatKernel(self.cost[index], self.epsilon, self.reach, self._departure[index])

    def softmin(self, g: Tensor, log_b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`; the masses b are taken to add up to 1."""
        b, exponents = log_b.exp(), g / self.epsilon
        beside = torch.linalg.vecdot(b, exponents.expm1()).unsqueeze(-1)
        beside = beside + products(b * exponents.exp(), self._departure.mT)
        return beside.log1p_().mul_(-self.epsilon)
