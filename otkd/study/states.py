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
        states: ``(tokens, width)``.
        lengths: tokens of each text, int64, ``(texts,)``.
        weight: of the output head, ``(vocab, width)``.
        bias: of the output head, ``(vocab,)``, or None.
    """

    states: Tensor
    lengths: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, texts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> StoredStates:
        """The states ``(length, width)`` of every text, with the head."""
        return cls(torch.cat([*texts]), torch.tensor([*map(len, texts)]), weight, bias)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int | slice | Tensor) -> StoredStates | HiddenStateTeacher:
        # Every training step reads some texts: only these are looked up, however many there are.
        ends, lengths = self.lengths.cumsum(0)[index], self.lengths[index]
        places = zip((ends - lengths).reshape(-1).tolist(), ends.reshape(-1).tolist(), strict=True)
        texts = [self.states[start:end] for start, end in places]
        if isinstance(index, int):
            return HiddenStateTeacher(texts[0], self.weight, self.bias)
        return StoredStates.of(texts, self.weight, self.bias)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StoredStates:
        """The same states and head on ``device``."""
        states, weight, bias = (
            None if x is None else x.to(device, non_blocking=non_blocking)
            for x in (self.states, self.weight, self.bias)
        )
        return replace(self, states=states, weight=weight, bias=bias)

    def logits(self) -> Tensor:
        """The logits ``(texts, longest, vocab)``; those after the end of a text mean nothing."""
        padded = pad_sequence([*self.states.split(self.lengths.tolist())], batch_first=True)
        return HiddenStateTeacher(padded, self.weight, self.bias).logits()

    def save(self, path: Path) -> None:
        """Write everything and a checksum to a safetensors file, atomically."""
        tensors = {"states": self.states, "lengths": self.lengths, "weight": self.weight}
        save_tensors(path, tensors if self.bias is None else {**tensors, "bias": self.bias})

    @classmethod
    def load(cls, path: Path) -> StoredStates:
        """Read a file written by :meth:`save`; ``ValueError`` if it is damaged."""
        tensors, _ = load_tensors(path, "states", "lengths", "weight")
        if int(tensors["lengths"].sum()) != len(tensors["states"]):
            raise ValueError(f"{path} holds another number of states than its lengths say")
        return cls(tensors["states"], tensors["lengths"], tensors["weight"], tensors.get("bias"))
