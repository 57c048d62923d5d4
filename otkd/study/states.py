"""A teacher of texts that differ in length, stored as its last hidden states without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from otkd.teachers import HiddenStateTeacher
from otkd.tensor_files import load_tensors, save_tensors


@dataclass(frozen=True)
class StoredStates:
    """The states of all tokens of a data set, one text after the other.

    As a :class:`~otkd.StoredTeacher`, its examples are the texts; their logits are padded on the
    right.

    Attributes:
        tokens: the teacher whose examples are the tokens of all texts.
        lengths: tokens of each text, int64, ``(texts,)``.
    """

    tokens: HiddenStateTeacher
    lengths: Tensor

    @classmethod
    def of(cls, texts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> StoredStates:
        """The states ``(length, width)`` of every text, with the head."""
        tokens = HiddenStateTeacher(torch.cat([*texts]), weight, bias)
        return cls(tokens, torch.tensor([*map(len, texts)]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int | slice | Tensor) -> StoredStates | HiddenStateTeacher:
        # Every training step reads some texts: only these are looked up, however many there are.
        ends, lengths = self.lengths.cumsum(0)[index], self.lengths[index]
        places = zip((ends - lengths).reshape(-1).tolist(), ends.reshape(-1).tolist(), strict=True)
        texts = [self.tokens.states[start:end] for start, end in places]
        if isinstance(index, int):
            return replace(self.tokens, states=texts[0])
        return StoredStates.of(texts, self.tokens.weight, self.tokens.bias)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StoredStates:
        """The same states and head on ``device``."""
        return replace(self, tokens=self.tokens.to(device, non_blocking))

    def logits(self) -> Tensor:
        """The logits ``(texts, longest, vocab)``; those after the end of a text mean nothing."""
        texts = self.tokens.states.split(self.lengths.tolist())
        return replace(self.tokens, states=pad_sequence([*texts], batch_first=True)).logits()

    def save(self, path: Path) -> None:
        """Write everything and a checksum to a safetensors file, atomically."""
        save_tensors(path, {**self.tokens.tensors, "lengths": self.lengths})

    @classmethod
    def load(cls, path: Path) -> StoredStates:
        """Read a file written by :meth:`save`; ``ValueError`` if it is damaged."""
        tensors, _ = load_tensors(path, "states", "lengths", "weight")
        lengths = tensors.pop("lengths")
        if int(lengths.sum()) != len(tensors["states"]):
            raise ValueError(f"{path} holds another number of states than its lengths say")
        return cls(HiddenStateTeacher(**tensors), lengths)
