"""Checks of a stored top-k teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from otkd.checks import check_positive
from otkd.precision import compute_dtype
from otkd.tensors import check_precision

if TYPE_CHECKING:
    from otkd.teachers.masses import StoredMasses
    from otkd.teachers.topk import TopKTeacher

MASS_SLACK = 0.05
"""How far above 1 the stored masses of a position may add up: bfloat16 has such errors."""

_BLOCK_ELEMENTS = 2**24


def check_shapes(teacher: TopKTeacher) -> None:
    """Raise ``ValueError`` for invalid shapes, dtypes or settings of a stored teacher."""
    tokens, masses = teacher.tokens, teacher.log_masses
    if tokens.dtype not in (torch.int32, torch.int64) or not masses.is_floating_point():
        raise ValueError(
            "TopKTeacher needs tokens of int32 or int64 and floating-point log_masses, got "
            f"{tokens.dtype} and {masses.dtype}"
        )
    check_precision("log_masses", masses)
    if tokens.ndim < 1 or tokens.shape != masses.shape:
        raise ValueError(
            "TopKTeacher needs tokens and log_masses of one shape (examples, *positions, k), "
            f"got {tuple(tokens.shape)} and {tuple(masses.shape)}"
        )
    if not 1 <= tokens.shape[-1] <= teacher.vocab_size:
        raise ValueError(
            f"TopKTeacher stores between 1 and vocab_size={teacher.vocab_size} tokens per "
            f"position, got {tokens.shape[-1]}"
        )
    check_positive(temperature=teacher.temperature)
    if (teacher.self_potential is None) != (teacher.self_settings is None):
        raise ValueError("self_potential and self_settings must be given together")
    if teacher.self_potential is not None:
        expected = (*tokens.shape[:-1], tokens.shape[-1] + 1)
        if tuple(teacher.self_potential.shape) != expected:
            raise ValueError(
                f"self_potential must have shape {expected}, one for every token and the tail, "
                f"got {tuple(teacher.self_potential.shape)}"
            )


def check_distributions(teacher: StoredMasses) -> None:
    """Raise ``ValueError`` unless every position is a distribution over distinct tokens."""
    flat = teacher.flatten()
    size = max(1, _BLOCK_ELEMENTS // teacher.k)
    for start in range(0, len(flat), size):
        _check_block(flat[start : start + size])


def check_self_term(teacher: TopKTeacher) -> None:
    """Raise ``ValueError`` unless the self-term is finite at every position with a teacher."""
    if teacher.self_potential is None:
        return
    there = ~teacher.log_masses.isnan().any(-1, keepdim=True)
    if (there & ~teacher.self_potential.isfinite()).any():
        raise ValueError(
            "self_potential is not finite at a position with a teacher: compute it again with "
            "loss.with_self_term(teacher)"
        )


def _check_block(block: StoredMasses) -> None:
    # Tokens of empty slots, and at positions without a teacher, may have any value. They are
    # replaced by distinct negative numbers.
    nothing = block.slots.empty.all(-1)
    empty = block.slots.empty | block.log_masses.isnan().any(-1, keepdim=True)
    places = torch.arange(-block.k, 0, device=empty.device)
    tokens = torch.where(empty, places, block.tokens.long())
    outside = (tokens >= block.vocab_size) | (~empty & (tokens < 0))
    ordered = tokens.sort(-1).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    log_masses = block.log_masses.to(compute_dtype(block.log_masses))
    total = log_masses.masked_fill(empty, -torch.inf).exp().sum(-1)
    heavy = total > 1 + MASS_SLACK
    if not (outside.any() | repeated.any() | heavy.any() | nothing.any()):  # synchronise once
        return
    if outside.any():
        known = tokens[~empty]
        raise ValueError(
            f"TopKTeacher has tokens from {int(known.min())} to {int(known.max())}, but its "
            f"vocabulary has {block.vocab_size} tokens"
        )
    if repeated.any():
        raise ValueError("TopKTeacher has a repeated token at one position")
    if nothing.any():
        raise ValueError(
            f"{int(nothing.sum())} of {len(nothing)} positions have only empty slots, and so no "
            "softmax. For positions without a teacher, use log_masses of NaN, and exclude them "
            "with a mask or labels of −100"
        )
    raise ValueError(
        "log_masses must be log-probabilities, but at one position the probabilities add up to "
        f"{total.nan_to_num().max().item():.4g}: subtract the log-sum-exp of all logits, divided "
        "by the temperature"
    )
