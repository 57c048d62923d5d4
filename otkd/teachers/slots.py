"""Which of the k slots of a position hold a token; a ragged top-k has empty slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """The tokens of N positions, some of which may have fewer than k.

    Attributes:
        tokens: ``(*batch, k)``, int64. An empty slot repeats the position's first token (0 if there
            is none), so that every slot can be gathered.
        empty: ``(*batch, k)``, boolean.
        source: ``(*batch, k)``: the slot whose token it is.
    """

    tokens: Tensor
    empty: Tensor
    source: Tensor

    @classmethod
    def of(cls, tokens: Tensor, empty: Tensor) -> Slots:
        """Slots from their tokens; the tokens of empty slots may have any value."""
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        first = (~empty).to(torch.uint8).argmax(-1, keepdim=True)
        source = torch.where(empty, first, places)
        return cls(tokens.long().gather(-1, source).clamp(min=0), empty, source)

    def write(self, target: Tensor, values: Tensor | float) -> Tensor:
        """``values`` ``(*batch, k)`` at the tokens of ``target`` ``(*batch, vocab)``, in place."""
        if not isinstance(values, Tensor):
            values = target.new_full((), values).expand(self.tokens.shape)
        values = values.gather(-1, self.source)
        nothing = self.empty.all(-1, keepdim=True)
        return target.scatter_(
            -1, self.tokens, torch.where(nothing, target.gather(-1, self.tokens), values)
        )


def empty_slots(tokens: Tensor, log_masses: Tensor, vocab_size: int) -> Tensor:
    """Whether a slot holds no token: its token is −1, or its mass is 0; ``(*batch, k)``.

    If all tokens of the vocabulary are stored, slots with mass 0 are not empty. A slot with NaN
    mass is not empty either, so that a position without a teacher is not mistaken for an empty one.
    """
    empty = ((tokens == -1) | (log_masses == -torch.inf)) & ~log_masses.isnan()
    return empty & ~complete_positions(tokens, vocab_size).unsqueeze(-1)


def complete_positions(tokens: Tensor, vocab_size: int) -> Tensor:
    """Whether every token of the vocabulary is stored, so that there is no tail; ``(*batch,)``."""
    if tokens.shape[-1] < vocab_size:
        return tokens.new_zeros(tokens.shape[:-1], dtype=torch.bool)
    return (tokens.sort(-1).values == torch.arange(vocab_size, device=tokens.device)).all(-1)
