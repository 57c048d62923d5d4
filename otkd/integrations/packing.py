"""Examples that a collator packs into one row: their lengths, and their stored teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from otkd.teachers import DenseTeacher, StoredTeacher, TopKTeacher

PACKED_KEY = "packed_lengths"


def packed_lengths(ids: Sequence[Any], batch: Mapping[str, Any]) -> Tensor | None:
    """The lengths ``(examples,)`` of the examples that a collator packed into one row.

    Args:
        ids: the ``input_ids`` of each example, or None.
        batch: what the collator made of the examples.

    Returns:
        None unless the batch has one row that consists of the tokens of all examples, in order and
        without padding.
    """
    row = batch.get("input_ids")
    if len(ids) < 2 or not isinstance(row, Tensor) or row.ndim != 2 or len(row) != 1:
        return None
    if any(each is None for each in ids):
        return None
    tokens = [torch.as_tensor(each).to(row) for each in ids]
    if any(each.ndim != 1 for each in tokens) or not torch.equal(torch.cat(tokens), row[0]):
        return None
    return torch.tensor([len(each) for each in tokens], device=row.device)


def packed_teacher(teacher: Tensor | StoredTeacher, lengths: Tensor) -> Any:
    """The row ``(1, tokens, …)`` of a stored teacher ``(examples, positions, …)``.

    Args:
        teacher: its positions beyond the length of an example are left out. Positions that it lacks
            have NaN, which a loss refuses where they count.
        lengths: of the examples, ``(examples,)``.

    Raises:
        ValueError: if the teacher has no positions.
    """
    if not isinstance(teacher, Tensor | TopKTeacher):
        features = teacher.features if isinstance(teacher, DenseTeacher) else None
        if features is not None:
            features = packed_teacher(features, lengths)
        return DenseTeacher(packed_teacher(teacher.logits(), lengths), features)
    if len(teacher.shape) != 3:
        raise ValueError(
            f"the stored teacher has shape {tuple(teacher.shape)}, without positions, but the "
            "collator packs the examples into one row: store (examples, positions, vocab), or pad"
        )
    kept = torch.arange(int(lengths.max())) < lengths[:, None]
    return with_length(teacher, kept.shape[1])[kept][None]


def with_length(values: Tensor | TopKTeacher, length: int) -> Any:
    """The first ``length`` positions of ``(rows, positions, …)``; missing positions have NaN."""
    if isinstance(values, TopKTeacher):
        return values.with_length(length)
    missing = length - values.shape[1]
    if missing <= 0:
        return values[:, :length]
    return torch.nn.functional.pad(values, (0, 0, 0, missing), value=float("nan"))
