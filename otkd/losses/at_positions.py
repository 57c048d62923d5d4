"""A teacher of some of the student's positions: where both of two tokenizers have a boundary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from otkd.reductions import IGNORE_INDEX, ItemCounts
from otkd.teachers import StoredTeacher


def is_counted(
    places: Tensor, length: int, labels: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """Whether each place is one of the ``length`` positions of its row, and counts there.

    Args:
        places: ``(rows, places)``, where negative numbers fill the rows.
        length: number of positions of a row.
        labels: ``(rows, length)``, −100 where a position does not count.
        mask: without labels, ``(rows, length)``, not 0 where a position counts; None if all do.
    """
    counted = (places >= 0) & (places < length)
    targets = mask != 0 if labels is None and mask is not None else labels
    if targets is None or not length:
        return counted
    targets = targets.to(places.device).expand(len(places), length)
    there = targets.gather(1, places.clamp(0, length - 1))
    return counted & (there != (False if labels is None else IGNORE_INDEX))


def at_places(values: Tensor, places: Tensor) -> Tensor:
    """``values`` ``(rows, positions, …)`` at ``places``; those beyond a row give another entry.

    Rows of one token have no position before a next token; all their entries are 0.
    """
    if not values.shape[1]:
        values = pad(values, (0, 0) * (values.ndim - 2) + (0, 1))  # keeps the gradient's graph
    rows = torch.arange(len(places), device=places.device).unsqueeze(1)
    return values[rows, places.clamp(0, values.shape[1] - 1)]


@dataclass(frozen=True)
class TeacherAtPositions:
    """The teacher in a call of a loss, if it is known at some of the student's positions only.

    A loss that needs the teacher is called with the student's logits there. Hard labels are
    compared at all positions.

    Attributes:
        teacher: logits ``(rows, places, vocab)`` or a stored teacher.
        places: ``(rows, places)``, the student's position of each.
        counted: ``(rows, places)``, whether it counts.
        items: how many count in the whole batch, or None.
    """

    teacher: Tensor | StoredTeacher
    places: Tensor
    counted: Tensor
    items: ItemCounts | Tensor | float | None = None
