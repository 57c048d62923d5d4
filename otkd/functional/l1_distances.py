"""L1 distances between all pairs of points, tile by tile.

``torch.cdist(p=1)`` computes a pair at a time, which on a CPU uses a small part of the processor.
Here the differences of a tile of pairs are one tensor that stays in the cache: with the coordinates
of a pair side by side where there are many, and coordinate by coordinate where there are few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Entries of a tile: large enough to hide the overhead of a call, and of waking up threads that may
# sleep; small enough for a shared cache.
_TILE = {"few": 2**20, "many": 2**21}
# Between these widths torch does as well, as it does for so few pairs of points of few coordinates.
_FEW, _MANY = 6, 256
_FEW_PAIRS = 2**16


def l1_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i − y_j|₁``, ``(*batch, n, m)``, for points ``(*batch, n, d)`` and ``(*batch, m, d)``.

    Differentiable once, in both; where two coordinates are equal their gradient is 0.
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
        distances = x.new_empty(len(x), len(y))
        for rows, columns, differences in _tiles(x, y, few):
            torch.sum(differences.abs_(), 0 if few else -1, out=distances[rows, columns])
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
        for rows, columns, differences in _tiles(x, y, ctx.few):
            signs, weights = differences.sign_(), gradients[0][rows, columns]
            if ctx.few:
                signs.mul_(weights)
            if grad_x is not None:
                by_rows = signs.sum(-1).mT if ctx.few else (weights.unsqueeze(1) @ signs).squeeze(1)
                grad_x[rows] += by_rows
            if grad_y is not None:
                # All pairs of a tile at once: Σ over its rows of weight · sign.
                by_columns = (
                    signs.sum(-2).mT if ctx.few else torch.einsum("ij,ijd->jd", weights, signs)
                )
                grad_y[columns] -= by_columns
        return grad_x, grad_y, None


def _tiles(x: Tensor, y: Tensor, few: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and ``x_i − y_j`` of a tile, in memory that the next one overwrites.

    Of ``few`` coordinates the differences are ``(d, rows, columns)``, else ``(rows, columns, d)``.
    """
    width, entries = x.shape[-1], _TILE["few" if few else "many"]
    columns = max(1, min(len(y), entries // width))
    rows = max(1, min(len(x), entries // (columns * width)))
    space = x.new_empty(rows * columns * width)
    left, right = (x.mT.contiguous(), y.mT.contiguous()) if few else (x, y)
    for i in range(0, len(x), rows):
        for j in range(0, len(y), columns):
            here, there = slice(i, min(i + rows, len(x))), slice(j, min(j + columns, len(y)))
            pairs = here.stop - i, there.stop - j
            if few:
                shape = (width, *pairs)
                block, others = left[:, here].unsqueeze(-1), right[:, there].unsqueeze(-2)
            else:
                shape = (*pairs, width)
                block, others = left[here].unsqueeze(1), right[there].unsqueeze(0)
            yield here, there, torch.sub(block, others, out=space[: math.prod(shape)].view(shape))
