"""Which tensors are supported: dtype, device and transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floating(name: str, tensor: Any, shape: str = "") -> None:
    """Raise unless ``tensor`` is a supported floating-point tensor.

    Args:
        name: of the argument, for the message.
        tensor: the argument.
        shape: the expected shape, for the message, such as ``"(*batch, vocab)"``.

    Raises:
        TypeError: if it is not a floating-point tensor, or has a precision below 16 bits.
        ValueError: if it has no data, as on the device "meta".
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
    if torch.compiler.is_compiling():  # the tracer does not support these checks
        return False
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    if wrapped is not None and wrapped(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_batched(gradient: Tensor) -> bool:
    """Whether the gradient stands for a batch of gradients, as in a vectorised Jacobian."""
    functorch = getattr(torch._C, "_functorch", None)
    kinds = ("is_batchedtensor", "is_legacy_batchedtensor")
    return any(ask(gradient) for kind in kinds if (ask := getattr(functorch, kind, None)))


def refuse_batched(what: str, gradient: Tensor) -> None:
    """Raise ``RuntimeError`` in a backward pass that supports only one gradient at a time."""
    if is_batched(gradient):
        raise RuntimeError(
            f"{what} supports one gradient at a time: compute the Jacobian with vectorize=False, "
            "or is_grads_batched=False"
        )


def block_elements(device: torch.device, on_cpu: int, on_device: int) -> int:
    """The number of elements in a block of work on ``device``: a cache is smaller than a GPU."""
    return on_cpu if device.type == "cpu" else on_device
