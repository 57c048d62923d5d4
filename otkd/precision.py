"""The precision of computations, independent of the logits' dtype and of autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def compute_dtype(student: Tensor) -> torch.dtype:
    """The precision of all computations: float64 for float64 logits, else float32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off for the device of ``x``."""
    device = x.device.type
    # Entering a context takes as long as a product of small matrices, so avoid it.
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.mT`` in the precision of the arguments, also in the backward pass.

    The backward pass of a plain matrix product would follow autocast if it runs inside autocast.
    """
    return _InnerProducts.apply(x, y)  # pyright: ignore[reportReturnType]


class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        with without_autocast(x):
            return x @ y.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        (gradient,) = gradients
        needs_x, needs_y = ctx.needs_input_grad
        with without_autocast(x):
            return (
                gradient @ y if needs_x else None,
                gradient.mT @ x if needs_y else None,
            )
