"""A stored teacher of another number of tokens: of the vocabulary, or of the slots."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from otkd.signals.slots import complete_positions

if TYPE_CHECKING:
    from otkd.signals.topk import TopKSignal


def sliced_signal(signal: TopKSignal, vocab_size: int, counted: Tensor | None = None) -> TopKSignal:
    """See :meth:`otkd.signals.TopKSignal.sliced`."""
    if vocab_size >= signal.vocab_size:
        return signal
    padding = signal.tokens >= vocab_size
    complete = complete_positions(signal.tokens, signal.vocab_size).unsqueeze(-1)
    heavy = padding & ~complete & (signal.log_masses > -torch.inf)
    if (heavy if counted is None else heavy[counted]).any():
        raise ValueError(
            f"the stored teacher has mass on tokens of the padding, from {vocab_size} on, and "
            "stored masses cannot be renormalised without all of them: rebuild the signal from "
            "logits[..., :vocab_size]"
        )
    sliced = replace(signal, tokens=signal.tokens.masked_fill(padding, -1))
    if sliced.k > vocab_size:
        sliced = _narrowed(sliced, vocab_size)
    return replace(sliced, vocab_size=vocab_size)


def widened_signal(signal: TopKSignal, k: int) -> TopKSignal:
    """The signal with empty slots up to ``k``."""
    missing = k - signal.k
    if not missing:
        return signal
    potential = signal.self_potential
    if potential is not None:
        stored, tail = potential.split([signal.k, 1], -1)
        potential = torch.cat([pad(stored, (0, missing)), tail], -1)
    return replace(
        signal,
        tokens=pad(signal.tokens, (0, missing), value=-1),
        log_masses=pad(signal.log_masses, (0, missing), value=-torch.inf),
        self_potential=potential,
    )


def _narrowed(signal: TopKSignal, k: int) -> TopKSignal:
    """The first ``k`` slots, after the empty ones have been moved to the end."""
    empty = signal.slots.empty.to(torch.uint8)
    order = (empty + (signal.tokens < 0)).sort(dim=-1, stable=True).indices[..., :k]
    potential = signal.self_potential
    if potential is not None:
        potential = torch.cat([potential.gather(-1, order), potential[..., -1:]], -1)
    return replace(
        signal,
        tokens=signal.tokens.gather(-1, order),
        log_masses=signal.log_masses.gather(-1, order),
        self_potential=potential,
    )
