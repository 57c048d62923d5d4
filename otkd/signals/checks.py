"""What a stored teacher of the heaviest tokens must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from otkd.checks import check_positive
from otkd.precision import compute_dtype

if TYPE_CHECKING:
    from otkd.signals.topk import TopKSignal

MASS_SLACK = 0.05
"""How far above 1 the stored masses of a position may add up: bfloat16 has such errors."""

_BLOCK_ELEMENTS = 2**24


def check_shapes(signal: TopKSignal) -> None:
    """Raise ``ValueError`` unless shapes, dtypes and settings are those of a signal."""
    tokens, masses = signal.tokens, signal.log_masses
    if tokens.dtype not in (torch.int32, torch.int64) or not masses.is_floating_point():
        raise ValueError(
            "TopKSignal needs tokens of int32 or int64 and floating-point log_masses, got "
            f"{tokens.dtype} and {masses.dtype}"
        )
    if tokens.ndim < 1 or tokens.shape != masses.shape:
        raise ValueError(
            "TopKSignal needs tokens and log_masses of one shape (examples, *positions, k), "
            f"got {tuple(tokens.shape)} and {tuple(masses.shape)}"
        )
    if not 1 <= tokens.shape[-1] <= signal.vocab_size:
        raise ValueError(
            f"TopKSignal stores between 1 and vocab_size={signal.vocab_size} tokens a position, "
            f"got {tokens.shape[-1]}"
        )
    check_positive(temperature=signal.temperature)
    if (signal.self_potential is None) != (signal.self_settings is None):
        raise ValueError("self_potential and self_settings are given together or not at all")
    if signal.self_potential is not None:
        expected = (*tokens.shape[:-1], tokens.shape[-1] + 1)
        if tuple(signal.self_potential.shape) != expected:
            raise ValueError(
                f"self_potential must have shape {expected}, one for every token and the tail, "
                f"got {tuple(signal.self_potential.shape)}"
            )


def check_distributions(signal: TopKSignal) -> None:
    """Raise ``ValueError`` unless every position is a distribution over distinct tokens."""
    flat = signal.flatten()
    for start in range(0, len(flat), max(1, _BLOCK_ELEMENTS // signal.k)):
        block = slice(start, start + max(1, _BLOCK_ELEMENTS // signal.k))
        tokens = flat.tokens[block].sort(-1).values
        low, high = tokens.min().item(), tokens.max().item()
        if low < 0 or high >= signal.vocab_size:
            raise ValueError(
                f"TopKSignal holds tokens from {low} to {high}, but there are "
                f"{signal.vocab_size} tokens in its vocabulary"
            )
        if (tokens[:, 1:] == tokens[:, :-1]).any():
            raise ValueError("TopKSignal holds a token twice at one position")
        total = flat.log_masses[block].to(compute_dtype(signal.log_masses)).exp().sum(-1)
        if (total > 1 + MASS_SLACK).any():
            raise ValueError(
                "log_masses must be log-probabilities, but those of a position add up to "
                f"{total.nan_to_num().max().item():.4g}: subtract the log-sum-exp of all "
                "logits over the temperature"
            )
