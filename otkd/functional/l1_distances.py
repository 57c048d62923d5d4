"""L1 distances between all pairs of points, tile by tile.

``torch.cdist(p=1)`` computes a pair at a time, which on a CPU uses a small part of the processor.
Here the differences of a tile of pairs are one tensor that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Entries of a tile: large enough to hide the overhead of a call, and of waking up threads that may
# sleep; small enough for a shared cache.
_TILE = 2**21
# Below this width a pair is too little work for the detour to pay.
_NARROW = 256


def l1_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i − y_j|₁``, ``(*batch, n, m)``, for points ``(*batch, n, d)`` and ``(*batch, m, d)``.

    Differentiable once, in both; where two coordinates are equal their gradient is 0.
    """
    if x.device.type != "cpu" or x.shape[-1] < _NARROW or x.ndim != 2:
        return torch.cdist(x, y, p=1)
    return _L1Distances.apply(x, y)  # pyright: ignore[reportReturnType]


class _L1Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        distances = x.new_empty(len(x), len(y))
        for rows, columns, differences in _tiles(x, y):
            torch.sum(differences.abs_(), -1, out=distances[rows, columns])
        return distances

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        needs_x, needs_y = ctx.needs_input_grad
        grad_x = torch.zeros_like(x) if needs_x else None
        grad_y = torch.zeros_like(y) if needs_y else None
        for rows, columns, differences in _tiles(x, y):
            signs, weights = differences.sign_(), gradients[0][rows, columns]
            if grad_x is not None:
                grad_x[rows] += (weights.unsqueeze(1) @ signs).squeeze(1)
            if grad_y is not None:
                # All pairs of a tile at once: Σ over its rows of weight · sign.
                grad_y[columns] -= torch.einsum("ij,ijd->jd", weights, signs)
        return grad_x, grad_y


def _tiles(x: Tensor, y: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and ``x_i − y_j`` of a tile, in a tensor that the next one overwrites."""
    columns = max(1, min(len(y), _TILE // x.shape[-1]))
    rows = max(1, min(len(x), _TILE // (columns * x.shape[-1])))
    space = x.new_empty(rows, columns, x.shape[-1])
    for i in range(0, len(x), rows):
        for j in range(0, len(y), columns):
            here, there = slice(i, i + rows), slice(j, j + columns)
            block, others = x[here].unsqueeze(1), y[there].unsqueeze(0)
            tile = space[: block.shape[0], : others.shape[1]]
            yield here, there, torch.sub(block, others, out=tile)
