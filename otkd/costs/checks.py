"""Requirements of debiasing on a cost matrix."""

from __future__ import annotations

import torch
from torch import Tensor

_CHECKED_SIZE = 1024


def check_self_cost(cost: Tensor) -> None:
    """Raise ``ValueError`` unless ``cost`` is square, symmetric and zero on the diagonal."""
    cost = cost.detach()
    advice = "; for two sets of points pass (C_ab, C_aa, C_bb) or a cost object, or use debias=None"
    if cost.shape[-1] != cost.shape[-2]:
        raise ValueError(
            "a debiased divergence needs the cost within each side: a single cost must be square, "
            f"got {tuple(cost.shape)}{advice}"
        )
    if cost.numel() and cost.diagonal(dim1=-2, dim2=-1).abs().max() > 1e-5 * cost.abs().max():
        raise ValueError(f"a self-cost must be 0 on its diagonal{advice}")
    check_symmetric(cost, advice)


def check_symmetric(cost: Tensor, advice: str = "") -> None:
    """Raise ``ValueError`` unless the cost within a side is square and symmetric."""
    cost = cost.detach()
    square = cost.ndim >= 2 and cost.shape[-1] == cost.shape[-2]
    if not square or (cost.numel() and (cost - cost.mT).abs().max() > 1e-5 * cost.abs().max()):
        raise ValueError(
            f"a self-cost must be square and symmetric, got shape {tuple(cost.shape)}{advice}"
        )


def has_positive_kernel(cost: Tensor, epsilon: float) -> bool:
    """Whether exp(−C/ε) of a symmetric matrix is verified to be positive semidefinite."""
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or len(cost) > _CHECKED_SIZE:
        return False
    kernel = torch.exp(cost.detach().double() / -epsilon)
    jitter = 1e-9 * len(kernel) * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    return bool(torch.linalg.cholesky_ex(kernel + jitter).info == 0)
