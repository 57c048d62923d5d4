"""Log-probabilities as inference servers return them, converted to tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

_ABOVE_ONE = 1e-2
"""How far masses may add up to more than 1: servers compute some of them in half precision."""


def tensors_of_logprobs(
    entries: Sequence[Any], vocab_size: int, k: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Tokens and log-masses, ``(positions, k)`` or ``(examples, positions, k)``.

    See :meth:`otkd.teachers.TopKTeacher.from_logprobs`.
    """
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence) or not entries:
        raise TypeError(
            "from_logprobs needs a list with an entry {token: logprob} for every position, or a "
            f"list of such lists, got {type(entries).__name__}"
        )
    flat = any(_is_entry(entry) for entry in entries)
    examples = [entries] if flat else entries
    rows = [
        [
            _checked(entry, vocab_size, f"position {j}" if flat else f"example {i}, position {j}")
            for j, entry in enumerate(example)
        ]
        for i, example in enumerate(examples)
    ]
    longest = max(len(row) for row in rows)
    most = max((len(pairs) for pairs in chain.from_iterable(rows) if pairs is not None), default=1)
    width = max(1, most if k is None else min(k, most))
    tokens = torch.full((len(rows), longest, width), -1, dtype=torch.int32)
    # A position that an example lacks has no teacher.
    log_masses = torch.full(tokens.shape, torch.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, pairs in enumerate(row):
            if pairs is None:
                continue
            log_masses[i, j] = -torch.inf
            kept = pairs[:width]
            tokens[i, j, : len(kept)] = torch.tensor([t for t, _ in kept], dtype=torch.int32)
            log_masses[i, j, : len(kept)] = torch.tensor([x for _, x in kept], dtype=torch.float64)
    log_masses = log_masses.to(dtype)
    return (tokens[0], log_masses[0]) if flat else (tokens, log_masses)


def _is_entry(entry: Any) -> bool:
    """Whether this is the entry of one position, as opposed to a list of positions."""
    if entry is None or isinstance(entry, Mapping):
        return True
    return isinstance(entry, Sequence) and len(entry) > 0 and all(map(_is_pair, entry))


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2 and not isinstance(pair[0], Sequence)


def _checked(entry: Any, vocab_size: int, where: str) -> list[tuple[int, float]] | None:
    """The tokens of a position with their log-probabilities, in decreasing order."""
    if entry is None:
        return None
    if isinstance(entry, Mapping):
        entry = list(entry.items())
    elif not isinstance(entry, Sequence) or not all(map(_is_pair, entry)):
        raise TypeError(
            f"{where} must be None, {{token: logprob}} or a list of pairs (token, logprob), got "
            f"{type(entry).__name__}"
        )
    if not entry:
        raise ValueError(f"{where} has no tokens: use None for a position without a teacher")
    pairs = [(token, _logprob(token, value, where)) for token, value in entry]
    for token, _ in pairs:
        if not isinstance(token, Integral):
            raise TypeError(
                f"{where}: tokens must be whole numbers, got {token!r}. Convert text with the "
                "teacher's tokenizer.convert_tokens_to_ids"
            )
        if not 0 <= int(token) < vocab_size:
            raise ValueError(
                f"{where}: token {token} is outside the vocabulary of {vocab_size} tokens"
            )
    if len({token for token, _ in pairs}) < len(pairs):
        raise ValueError(f"{where} holds a token twice")
    total = math.fsum(math.exp(value) for _, value in pairs)
    if total > 1 + _ABOVE_ONE:
        raise ValueError(
            f"{where}: the probabilities add up to {total:.4g}; natural logarithms of "
            "probabilities, which add up to at most 1, are expected"
        )
    return sorted(pairs, key=lambda pair: -pair[1])


def _logprob(token: Any, value: Any, where: str) -> float:
    value = getattr(value, "logprob", value)  # an object of vLLM
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{where}: the log-probability of token {token!r} must be a number, got {value!r}"
        ) from None
    if not value <= math.log1p(_ABOVE_ONE):
        raise ValueError(
            f"{where}: the log-probability of token {token!r} must be at most 0, got {value!r}"
        )
    return min(value, 0.0)
