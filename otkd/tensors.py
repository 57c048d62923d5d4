"""Which tensors can be computed with: their precision, their device, what transforms them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floating(name: str, tensor: Any, shape: str = "") -> None:
    """Raise unless ``tensor`` holds floating-point numbers that can be computed with.

    Args:
        name: of the argument, for the message.
        tensor: what was given.
        shape: what its shape should be, for the message, such as ``"(*batch, vocab)"``.

    Raises:
        TypeError: if it is no floating-point tensor, or one of a precision below 16 bits.
        ValueError: if it holds no numbers, as tensors on the device "meta" do.
        RuntimeError: inside a transform of torch.func or forward-mode differentiation.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        wanted = f"a floating-point tensor {shape}".rstrip()
        raise TypeError(f"{name} must be {wanted}, got {kind}")
    check_precision(name, tensor)
    if tensor.device.type == "meta":
        raise ValueError(
            f"{name} is on the device 'meta', where tensors have no data: load the weights of the "
            "model first"
        )
    if _is_transformed(tensor):
        raise RuntimeError(
            f"{name} is inside vmap, torch.func.grad or forward-mode differentiation, which do not "
            "support solvers and checks that depend on the data. Instead of vmap, add a batch "
            "dimension (every batch shape is accepted); for gradients, call backward() or "
            "torch.autograd.grad()"
        )


def check_precision(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` for floating-point numbers of fewer than 16 bits."""
    if tensor.dtype not in PRECISIONS:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}: convert "
            "it with .float(), after multiplying by its scale if it is a quantised one"
        )


def _is_transformed(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():  # which traces through none of this
        return False
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    if wrapped is not None and wrapped(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_batched(gradient: Tensor) -> bool:
    """Whether it stands for many gradients at once, as it does while a Jacobian is vectorised."""
    functorch = getattr(torch._C, "_functorch", None)
    kinds = ("is_batchedtensor", "is_legacy_batchedtensor")
    return any(ask(gradient) for kind in kinds if (ask := getattr(functorch, kind, None)))


def refuse_batched(what: str, gradient: Tensor) -> None:
    """Raise ``RuntimeError`` in a backward pass that can only follow one gradient at a time."""
    if is_batched(gradient):
        raise RuntimeError(
            f"{what} supports one gradient at a time: compute the Jacobian with vectorize=False, "
            "or is_grads_batched=False"
        )
