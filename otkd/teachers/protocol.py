"""The protocol of a stored teacher."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class StoredTeacher(Protocol):
    """Stored outputs of a teacher, which can be indexed like the batch of its logits.

    A stored teacher covers the examples ``0 … len(teacher) - 1``. Indexing with an integer, a slice
    or an index tensor gives the stored teacher of those examples; ``logits()`` gives dense teacher
    logits of shape ``(*batch, vocab)``. For losses that compare features it may also have
    ``features``, a tensor ``(*batch, width)``.
    """

    def __len__(self) -> int:
        """Number of examples stored."""
        ...

    def __getitem__(self, index) -> StoredTeacher:
        """The stored teacher of the chosen examples."""
        ...

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StoredTeacher:
        """The same teacher on another device, as transformers moves a batch."""
        ...

    def logits(self) -> Tensor:
        """Dense teacher logits, ``(*batch, vocab)``, up to a constant per position."""
        ...


def teacher_logits_of(teacher: Tensor | StoredTeacher, device: torch.device) -> Tensor:
    """Teacher logits as a detached tensor on ``device``, from logits or from a stored teacher.

    Raises:
        TypeError: if ``teacher`` is neither a tensor nor a :class:`StoredTeacher`.
    """
    if isinstance(teacher, Tensor):
        return teacher.detach()
    if isinstance(teacher, StoredTeacher):
        return teacher.to(device).logits().detach()
    raise TypeError(
        "teacher_logits must be a tensor of shape (*batch, vocab) or a StoredTeacher, got "
        f"{type(teacher).__name__}"
    )


def teacher_features_of(teacher: object, device: torch.device) -> Tensor | None:
    """The features of a stored teacher, detached on ``device``; None if it has none."""
    features = getattr(teacher, "features", None)
    return features.detach().to(device) if isinstance(features, Tensor) else None
