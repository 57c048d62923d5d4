"""L1 distances between all pairs of points, in tiles.

On a CPU ``torch.cdist(p=1)`` computes one pair at a time, which uses a small part of the processor.
Here the differences of a tile of pairs form one tensor that stays in the cache. For points with
many coordinates these are contiguous per pair; for few coordinates, tiles are computed one
coordinate at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Entries of a tile: large enough to hide the overhead of a call and of waking up threads, small
# enough for a shared cache.
_TILE = 2**20
# Coordinates of a tile, which are read repeatedly and should stay in the cache.
_SPAN = 512
# Between these widths, and for so few pairs of narrow points, torch.cdist is as fast.
_FEW, _MANY = 6, 256
_FEW_PAIRS = 2**16


def l1_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i − y_j|₁``, ``(*batch, n, m)``, for points ``(*batch, n, d)`` and ``(*batch, m, d)``.

    Differentiable once, in both arguments. The gradient is 0 where two coordinates are equal.
    """
    width = x.shape[-1]
    few = width <= _FEW and len(x) * len(y) >= _FEW_PAIRS
    if x.device.type != "cpu" or x.ndim != 2 or not (few or width >= _MANY):
        return torch.cdist(x, y, p=1)
    return _L1Distances.apply(x, y, few)  # pyright: ignore[reportReturnType]


class _L1Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, few: bool) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.few = few
        distances, coordinates = x.new_empty(len(x), len(y)), 0 if few else -1
        for rows, columns, span, differences in _tiles(x, y, few):
            if span.start == 0:
                torch.sum(differences.abs_(), coordinates, out=distances[rows, columns])
            else:
                distances[rows, columns] += differences.abs_().sum(coordinates)
        return distances

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, y = ctx.saved_tensors
        grad_x, grad_y = (
            torch.zeros_like(points) if needed else None
            for points, needed in zip((x, y), ctx.needs_input_grad, strict=False)
        )
        for rows, columns, span, differences in _tiles(x, y, ctx.few):
            signs, weights = differences.sign_(), gradients[0][rows, columns]
            if ctx.few:
                signs.mul_(weights)
            if grad_x is not None:
                by_rows = signs.sum(-1).mT if ctx.few else (weights.unsqueeze(1) @ signs).squeeze(1)
                grad_x[rows, span] += by_rows
            if grad_y is not None:
                # All pairs of a tile at once: Σ over its rows of weight · sign.
                by_columns = (
                    signs.sum(-2).mT if ctx.few else torch.einsum("ij,ijd->jd", weights, signs)
                )
                grad_y[columns, span] -= by_columns
        return grad_x, grad_y, None


def _tiles(x: Tensor, y: Tensor, few: bool) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Rows, columns, coordinates and ``x_i − y_j`` of each tile; the buffer is reused for the next.

    With ``few`` coordinates the differences are ``(d, rows, columns)``, otherwise
    ``(rows, columns, d)``.
    """
    width = min(x.shape[-1], _SPAN)
    columns = max(1, min(len(y), _TILE // width))
    rows = max(1, min(len(x), _TILE // (columns * width)))
    space = x.new_empty(rows * columns * width)
    left, right = (x.mT.contiguous(), y.mT.contiguous()) if few else (x, y)
    starts = range(0, x.shape[-1], width), range(0, len(x), rows), range(0, len(y), columns)
    for k, i, j in itertools.product(*starts):
        span, here, there = slice(k, k + width), slice(i, i + rows), slice(j, j + columns)
        if few:
            block, others = left[:, here].unsqueeze(-1), right[:, there].unsqueeze(-2)
            shape = (len(block), block.shape[1], others.shape[2])
        else:
            block, others = left[here, span].unsqueeze(1), right[there, span].unsqueeze(0)
            shape = (len(block), *others.shape[1:])
        out = space[: math.prod(shape)].view(shape)
        yield here, there, span, torch.sub(block, others, out=out)
