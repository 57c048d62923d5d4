"""The choice of the kernel for a cost."""

from __future__ import annotations

import torch
from torch import Tensor

from otkd.ot.kernels.base import LARGEST_EXPONENT, Kernel, LogKernel, ProductKernel
from otkd.ot.kernels.flat import LARGEST_FLAT_REACH, FlatKernel
from otkd.ot.kernels.lazy import LazyCost
from otkd.ot.kernels.stabilised import StabilisedKernel


def kernel_of(cost: Tensor | LazyCost, epsilon: float, *, problems: int) -> Kernel:
    """The kernel of a cost, for this number of problems."""
    if isinstance(cost, LazyCost):
        return cost.kernel(epsilon)
    return dense_kernel(cost, epsilon, single=problems == 1)


def dense_kernel(
    cost: Tensor, epsilon: float, *, reach: float | None = None, single: bool = False
) -> Kernel:
    """Products if exp(−C/ε) is representable; otherwise around potentials, or in the log domain.

    Args:
        cost: ``(n, m)``, or one for each problem, ``(B, n, m)``.
        epsilon: strength of the entropic regularisation.
        reach: the largest |C|/ε, if it is known.
        single: whether the cost belongs to a single problem, whose kernel is stored. Problems that
            share a cost cannot use a kernel around potentials, which would be a matrix for each.
    """
    if cost.numel() == 0:
        return LogKernel(cost, epsilon)
    if reach is None:
        reach = float(max(map(abs, torch.stack(torch.aminmax(cost)).tolist()))) / epsilon
    if reach <= LARGEST_FLAT_REACH:
        return FlatKernel(cost, epsilon, reach)
    largest = LARGEST_EXPONENT[cost.dtype]
    # For a single problem, scaling gains more than the checks of the other kernel cost.
    if reach <= largest / 2 or (reach <= largest and not single):
        return ProductKernel(cost, epsilon, scales=reach <= largest / 2)
    if single or cost.ndim > 2:
        return StabilisedKernel(cost, epsilon)
    return LogKernel(cost, epsilon)
