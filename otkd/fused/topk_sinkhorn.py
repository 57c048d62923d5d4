"""The Triton backend of :class:`otkd.supports.TopK`: one program per position.

The kernel is in :mod:`otkd.fused.topk_kernel`, which is imported on first use. Its reference is the
torch implementation: the costs of :mod:`otkd.supports.topk`, solved by
:func:`otkd.ot.divergence.solve_divergence`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from otkd.checks import check_choice, check_positive
from otkd.costs.embedding import METRICS
from otkd.extras import missing
from otkd.scalars import as_whole

LARGEST_HEAD = 128
"""The most tokens a position may have."""

_SMALLEST_BLOCK = 16  # of tl.dot
_BLOCK_WIDTH = 16
_ROWS_PER_WARP = 8


@torch.no_grad()
def topk_sinkhorn(
    a: Float[Tensor, "n atoms"],
    b: Float[Tensor, "n atoms"],
    tokens: Int[Tensor, "n k"],
    embedding: Float[Tensor, "vocab width"],
    tail_cost: Float[Tensor, " vocab"],
    corner_cost: float | Float[Tensor, ""],
    *,
    metric: str,
    scale: float,
    centre: Float[Tensor, " width"] | None,
    epsilon: float,
    tolerance: float,
    max_iterations: int,
    debias: bool,
) -> tuple[
    Float[Tensor, " n"], Float[Tensor, "n atoms"], Float[Tensor, " n"], Int[Tensor, " n"]
]:  # fmt: skip
    """S_ε(a, b), or OT_ε(a, b), of every position, and its gradient in a.

    The atoms of a position are its K tokens and, last, the tail. All arithmetic is in float32.

    Args:
        a: source masses, float32; each row adds up to 1. They may be 0: those of repeated tokens
            must be, and so is that of the tail where there is none.
        b: target masses, likewise.
        tokens: of both sides, int64; at most 128 a position.
        embedding: of the vocabulary, in any floating-point dtype.
        tail_cost: from each token of the vocabulary to the tail, in the final units.
        corner_cost: from the tail to itself, in the final units.
        metric: ``"sqeuclidean"``, ``"euclidean"`` or ``"cosine"``, of embeddings. Distances come
            from inner products, so that a euclidean one far below the spread of the vocabulary,
            but not 0, has an error of about 3e-4 of that spread.
        scale: what the distances of embeddings are divided by.
        centre: subtracted from the embeddings, so that the distances of points far from the origin
            lose no digits; None, or with ``"cosine"``, does not.
        epsilon: strength of the entropic term, in the final units of the cost.
        tolerance: L1 marginal error at which a problem is solved.
        max_iterations: limit of each of the problems.
        debias: S_ε(a, b) = OT_ε(a, b) − ½·OT_ε(a, a) − ½·OT_ε(b, b), with the gradient
            f_ab − f_aa; else OT_ε(a, b) with f_ab, where ⟨a, f⟩ = ⟨b, g⟩.

    Returns:
        value ``(N,)``, gradient ``(N, K + 1)``, and of the up to three problems of a position the
        largest marginal error and the most iterations, ``(N,)`` each. A position is solved where
        the error is at most ``tolerance``.

    Raises:
        ImportError: if triton is not installed.
        ValueError: if shapes, devices or dtypes do not fit, K is larger than it may be, the tensors
            are not on a GPU, or a setting is out of range.

    Source: Feydy et al. (2019), "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences".
    """
    check_choice("metric", metric, METRICS)
    check_positive(scale=scale, epsilon=epsilon, tolerance=tolerance)
    max_iterations = as_whole("max_iterations", max_iterations)
    corner = torch.as_tensor(corner_cost, dtype=torch.float32, device=a.device).reshape(1)
    _check(a, b, tokens, embedding, tail_cost, centre)
    positions, size = tokens.shape
    value, error = a.new_empty(positions), a.new_empty(positions)
    iterations = torch.empty(positions, dtype=torch.int32, device=a.device)
    grad = torch.empty_like(a, memory_format=torch.contiguous_format)
    if positions == 0:
        return value, grad, error, iterations
    if embedding.stride(1) != 1:
        embedding = embedding.contiguous()
    if metric == "cosine":
        centre = None
    block = max(_SMALLEST_BLOCK, 1 << (size - 1).bit_length())
    _import_kernel()[(positions,)](
        a.contiguous(), b.contiguous(), tokens.contiguous(),
        embedding, embedding.stride(0), None if centre is None else centre.float().contiguous(),
        tail_cost.float().contiguous(), corner,
        value, grad, error, iterations,
        size, embedding.shape[1], float(scale), float(epsilon), float(tolerance), max_iterations,
        METRIC=metric, DEBIAS=debias, BLOCK=block, BLOCK_WIDTH=_BLOCK_WIDTH,
        num_warps=block // _ROWS_PER_WARP,
    )  # fmt: skip
    return value, grad, error, iterations


class TopKSinkhorn(torch.autograd.Function):
    """:func:`topk_sinkhorn` with a value that is differentiable in a, and in nothing else."""

    @staticmethod
    def forward(ctx, a, b, tokens, embedding, tail_cost, corner_cost, settings):
        """``(value, marginal_error, iterations)``; ``settings`` are the keywords, as a dict.

        Raises:
            ValueError: if anything but a requires a gradient; see :func:`topk_sinkhorn`, too.
        """
        if any(ctx.needs_input_grad[1:]):
            raise ValueError(
                "the Triton backend computes gradients of the source masses only: detach the other "
                "tensors, or use backend='torch'"
            )
        value, grad, error, iterations = topk_sinkhorn(
            a, b, tokens, embedding, tail_cost, corner_cost, **settings
        )
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(error, iterations)
        return value, error, iterations

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value, *_):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = ctx.saved_tensors
        return grad_value.unsqueeze(-1) * grad, *(None,) * 6


def _import_kernel() -> Any:
    message = missing("backend='triton'", "triton", extra="triton")
    if message:
        raise ImportError(message)
    from otkd.fused.topk_kernel import topk_sinkhorn_kernel

    return topk_sinkhorn_kernel


def _check(a, b, tokens, embedding, tail_cost, centre) -> None:
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise ValueError(
            f"the Triton backend computes in float32, got masses of {a.dtype} and {b.dtype}; "
            "use backend='torch' for another precision"
        )
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(
            f"tokens must be int64 (positions, k), got {tokens.dtype} {tuple(tokens.shape)}"
        )
    positions, size = tokens.shape
    if not 1 <= size <= LARGEST_HEAD:
        raise ValueError(
            f"the Triton backend supports 1 to {LARGEST_HEAD} tokens per position, got {size}; use "
            "backend='torch' for more"
        )
    if embedding.ndim != 2 or not embedding.is_floating_point():
        raise ValueError(
            "embedding must be a floating-point matrix (vocab, width), got "
            f"{embedding.dtype} {tuple(embedding.shape)}"
        )
    vocab, width = embedding.shape
    shapes = {
        "a": (a, (positions, size + 1)),
        "b": (b, (positions, size + 1)),
        "tail_cost": (tail_cost, (vocab,)),
    }
    if centre is not None:
        shapes["centre"] = (centre, (width,))
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    devices = {str(x.device) for x in (tokens, embedding, *(x for x, _ in shapes.values()))}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (a.is_cuda or interpreted):
        raise ValueError(
            f"the Triton backend runs on a GPU, got tensors on {a.device}; use backend='torch'"
        )
