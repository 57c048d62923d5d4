"""A stored teacher that keeps hidden states, from which its output head computes the logits."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from otkd.tensor_files import load_tensors, save_tensors
from otkd.tensors import check_precision


@dataclass(frozen=True, repr=False)
class HiddenStateTeacher:
    """The last hidden states of a teacher and its output head: exact logits in little memory.

    The logits of a language model are usually a linear function of its last hidden states, h·Wᵀ + b
    with the rows of W as output embeddings. The states are smaller than the logits by the ratio of
    vocabulary to width (85 for SmolLM2-135M). The logits are computed when a batch is read, with
    N·vocab·width multiplications for N positions: far less than a forward pass of the teacher.

    Models that change the logits after the head, such as Gemma 2 with its soft-capping, need
    another stored teacher: compare ``logits()`` with the model's before you rely on it.

    Attributes:
        states: ``(examples, *positions, width)``, those that the head reads (in most models those
            after the final norm).
        weight: of the head, ``(vocab, width)``.
        bias: of the head, ``(vocab,)``, or None.

    Raises:
        TypeError: for tensors that are not floating-point numbers.
        ValueError: for shapes or devices that do not belong together.

    Example:
        >>> states = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # one text of two tokens
        >>> teacher = otkd.HiddenStateTeacher(states, weight=torch.eye(3, 2))
        >>> teacher
        HiddenStateTeacher((1, 2, 3), width=2, dtype=torch.float32)
        >>> otkd.KLLoss()(torch.zeros(1, 2, 3), teacher[:1])
        tensor(0.2782)
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        states, weight, bias = self.states, self.weight, self.bias
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                raise TypeError(f"{name} must have floating-point numbers, got {tensor.dtype}")
            check_precision(name, tensor)
            if tensor.device != states.device:
                raise ValueError(
                    f"{name} must be on the device of the states, {states.device}, got "
                    f"{tensor.device}"
                )
        if states.ndim < 1 or weight.ndim != 2 or states.shape[-1] != weight.shape[-1]:
            raise ValueError(
                "states must be (examples, *positions, width) and weight (vocab, width), got "
                f"{tuple(states.shape)} and {tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")

    def __repr__(self) -> str:
        width, dtype = self.states.shape[-1], self.states.dtype
        return f"HiddenStateTeacher({tuple(self.shape)}, width={width}, dtype={dtype})"

    @property
    def shape(self) -> torch.Size:
        """That of the logits, ``(examples, *positions, vocab)``."""
        return torch.Size((*self.states.shape[:-1], len(self.weight)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The states, the weight and the bias, if there is one, by their names."""
        found = {"states": self.states, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __len__(self) -> int:
        return self.states.shape[0]

    def __getitem__(self, index) -> HiddenStateTeacher:
        return replace(self, states=self.states[index])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HiddenStateTeacher:
        """The same states and head on ``device``."""
        tensors = self.tensors.items()
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in tensors}
        return HiddenStateTeacher(**moved)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """h·Wᵀ + b in the precision of the head, ``(examples, *positions, vocab)``."""
        return linear(self.states.to(self.weight.dtype), self.weight, self.bias)

    def save(self, path: str | os.PathLike) -> None:
        """Write states, head and a checksum to a safetensors file, atomically.

        Raises:
            ImportError: if safetensors is not installed.
        """
        save_tensors(path, self.tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> HiddenStateTeacher:
        """Read a file written by :meth:`save`.

        Raises:
            ImportError: if safetensors is not installed.
            ValueError: if the file is not a safetensors file, was changed after it was saved, or
                lacks ``states`` or ``weight``.
        """
        tensors, _ = load_tensors(path, "states", "weight")
        return cls(tensors["states"], tensors["weight"], tensors.get("bias"))
