"""A stored teacher that keeps every logit."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.signals.files import load_tensors, save_tensors


@dataclass(frozen=True)
class DenseSignal:
    """All teacher logits of a data set, example by example.

    Attributes:
        values: logits, ``(examples, *positions, vocab)``; half precision is fine.
    """

    values: Tensor

    def __post_init__(self):
        if self.values.ndim < 1 or not self.values.is_floating_point():
            raise ValueError(
                "DenseSignal needs floating-point logits with the vocabulary last, "
                f"got shape {tuple(self.values.shape)} and dtype {self.values.dtype}"
            )

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, index) -> DenseSignal:
        return DenseSignal(self.values[index])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DenseSignal:
        """The same logits on ``device``."""
        if self.values.device == torch.device(device):
            return self
        return DenseSignal(self.values.to(device, non_blocking=non_blocking))

    def logits(self) -> Tensor:
        """The stored logits."""
        return self.values

    def save(self, path: str | os.PathLike) -> None:
        """Write the logits to a safetensors file, whole or not at all."""
        save_tensors(path, {"logits": self.values})

    @classmethod
    def load(cls, path: str | os.PathLike) -> DenseSignal:
        """Read logits written by :meth:`save`.

        Raises:
            ValueError: if it is no safetensors file, or holds no tensor named ``logits``.
        """
        return cls(load_tensors(path, "logits")[0]["logits"])
