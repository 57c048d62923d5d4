"""The protocol between a loss and a stored teacher."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class TeacherSignal(Protocol):
    """A teacher's outputs, stored; indexes like the batch of logits it stands for.

    A signal covers examples ``0 … len(signal) - 1``. Indexing with an integer, a slice or an index
    tensor gives the signal of those examples; ``logits()`` gives dense teacher logits of shape
    ``(*batch, vocab)``. For losses over representations a signal may have ``features``, too, a
    tensor ``(*batch, width)``.
    """

    def __len__(self) -> int:
        """Number of examples stored."""
        ...

    def __getitem__(self, index) -> TeacherSignal:
        """The signal of the chosen examples."""
        ...

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TeacherSignal:
        """The same signal on another device; called as batches of transformers call it."""
        ...

    def logits(self) -> Tensor:
        """Dense teacher logits, ``(*batch, vocab)``, up to a constant per position."""
        ...


def teacher_logits_of(teacher: Tensor | TeacherSignal, device: torch.device) -> Tensor:
    """Teacher logits as a detached tensor on ``device``, from logits or from a stored signal.

    Raises:
        TypeError: if ``teacher`` is neither a tensor nor a :class:`TeacherSignal`.
    """
    if isinstance(teacher, Tensor):
        return teacher.detach()
    if isinstance(teacher, TeacherSignal):
        return teacher.to(device).logits().detach()
    raise TypeError(
        "teacher_logits must be a tensor of shape (*batch, vocab) or a stored TeacherSignal, "
        f"got {type(teacher).__name__}"
    )


def teacher_features_of(teacher: object, device: torch.device) -> Tensor | None:
    """The features of a stored signal, detached on ``device``; None if it has none."""
    features = getattr(teacher, "features", None)
    return features.detach().to(device) if isinstance(features, Tensor) else None
