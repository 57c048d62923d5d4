"""A stored teacher that keeps every logit and, optionally, features."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.tensor_files import load_tensors, save_tensors
from otkd.tensors import check_precision


@dataclass(frozen=True, repr=False)
class DenseTeacher:
    """All teacher logits of a data set.

    Attributes:
        values: logits, ``(examples, *positions, vocab)``; half precision is possible.
        features: the teacher's hidden states ``(examples, *positions, width)``, for losses that
            compare features, or None.

    Example:
        >>> teacher = otkd.DenseTeacher(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
        >>> otkd.KLLoss()(torch.tensor([[1.0, 0.0]]), teacher[:1])
        tensor(0.1201)
    """

    values: Tensor
    features: Tensor | None = None

    def __post_init__(self):
        if self.values.ndim < 1 or not self.values.is_floating_point():
            raise ValueError(
                "DenseTeacher needs floating-point logits with the vocabulary last, "
                f"got shape {tuple(self.values.shape)} and dtype {self.values.dtype}"
            )
        check_precision("values", self.values)
        features = self.features
        if features is None:
            return
        shape = self.values.shape[:-1]
        if (
            not features.is_floating_point()
            or features.ndim != self.values.ndim
            or features.shape[:-1] != shape
        ):
            raise ValueError(
                f"features must have shape {tuple(shape)} + (width,) and floating-point numbers, "
                f"got shape {tuple(features.shape)} and dtype {features.dtype}"
            )
        if features.device != self.values.device:
            raise ValueError(
                f"features must be on the device of the logits, {self.values.device}, got "
                f"{features.device}"
            )

    def __repr__(self) -> str:
        features = "" if self.features is None else f", features={tuple(self.features.shape)}"
        return f"DenseTeacher({tuple(self.values.shape)}, dtype={self.values.dtype}{features})"

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, index) -> DenseTeacher:
        features = None if self.features is None else self.features[index]
        return DenseTeacher(self.values[index], features)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DenseTeacher:
        """The same logits and features on ``device``."""
        if self.values.device == torch.device(device):
            return self
        features = self.features
        if features is not None:
            features = features.to(device, non_blocking=non_blocking)
        return DenseTeacher(self.values.to(device, non_blocking=non_blocking), features)

    def logits(self) -> Tensor:
        """The stored logits."""
        return self.values

    def save(self, path: str | os.PathLike) -> None:
        """Write logits, features and a checksum to a safetensors file, atomically.

        Raises:
            ImportError: if safetensors is not installed.
        """
        tensors = {"logits": self.values}
        if self.features is not None:
            tensors["features"] = self.features
        save_tensors(path, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> DenseTeacher:
        """Read a file written by :meth:`save`.

        Raises:
            ImportError: if safetensors is not installed.
            ValueError: if the file is not a safetensors file, was changed after it was saved, or
                holds no tensor named ``logits``.
        """
        tensors, _ = load_tensors(path, "logits")
        return cls(tensors["logits"], tensors.get("features"))
