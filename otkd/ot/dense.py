"""Which kernel a cost in memory has."""

from __future__ import annotations

import torch
from torch import Tensor

from otkd.ot.kernels import LARGEST_EXPONENT, Kernel, LogKernel, ProductKernel
from otkd.ot.stabilised import StabilisedKernel


def dense_kernel(cost: Tensor, epsilon: float, *, single: bool = False) -> Kernel:
    """Products where exp(−C/ε) is representable; else about potentials, or in the log domain.

    Args:
        cost: ``(n, m)``, or one for each problem, ``(B, n, m)``.
        epsilon: strength of the entropic term.
        single: whether the cost is for one problem, which keeps its kernel. Those that share a cost
            cannot be held at potentials: a density for each would be as many matrices.
    """
    if cost.numel() == 0:
        return LogKernel(cost, epsilon)
    reach = max(map(abs, torch.stack(torch.aminmax(cost)).tolist())) / epsilon
    largest = LARGEST_EXPONENT[cost.dtype]
    # Scaling is more to a single problem than what the checks of the other kernel take.
    if reach <= largest / 2 or (reach <= largest and not single):
        return ProductKernel(cost, epsilon, scales=reach <= largest / 2)
    if single or cost.ndim > 2:
        return StabilisedKernel(cost, epsilon)
    return LogKernel(cost, epsilon)
