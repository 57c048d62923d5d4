"""What a loss compares in a batch, and the call of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from otkd.integrations.counting import counted_items
from otkd.integrations.stored import TEACHER_KEY
from otkd.losses.at_positions import TeacherAtPositions, is_counted
from otkd.losses.protocol import as_loss
from otkd.losses.weighted import call_loss
from otkd.reductions import ItemCounts, count_items

Items = ItemCounts | Tensor | float


@dataclass(frozen=True)
class Comparison:
    """Outputs of a batch, aligned with its labels or mask; see :meth:`Pair.compare`.

    Attributes:
        student: the logits that the loss gets, and features if it needs them.
        teacher: the same of the teacher; None if the batch has no teacher.
        labels: one per position of the logits, or None.
        mask: without labels, whether each position counts; None if all do.
        predictions: the student's logits, also where no label follows.
        auxiliary: the auxiliary loss of the student, or None.
        places: if the teacher has its own tokenizer, the student's positions ``(rows, places)`` at
            which it is known; its logits are those there.
    """

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Any] | None
    labels: Tensor | None
    mask: Tensor | None
    predictions: Tensor
    auxiliary: Tensor | None
    places: Tensor | None = None

    def first(self, examples: int, packed: Tensor | None = None) -> Comparison:
        """The comparison of the first ``examples``; the predictions stay whole.

        Args:
            examples: how many.
            packed: the lengths of all examples if they are one row.
        """
        index: Any = slice(examples)
        if packed is not None:
            index = (slice(min(examples, 1)), slice(int(packed[:examples].sum())))
        # Places of other examples of a packed row are beyond its new end, so they do not count.
        of_teacher = index if self.places is None else slice(len(self.places[slice(examples)]))
        labels, mask = (None if x is None else x[index] for x in (self.labels, self.mask))
        return replace(
            self,
            student={name: values[index] for name, values in self.student.items()},
            teacher=self.teacher and {name: x[of_teacher] for name, x in self.teacher.items()},
            labels=labels,
            mask=mask,
            places=None if self.places is None else self.places[of_teacher],
        )

    @property
    def common(self) -> Tensor | None:
        """Whether each of the places counts, ``(rows, places)``; None without places."""
        if self.places is None:
            return None
        length = self.student["logits"].shape[1]
        return is_counted(self.places, length, self.labels, self.mask)

    def suffices(self, loss: nn.Module, *, training: bool) -> bool:
        """Whether the batch has the teacher and the labels that the loss needs.

        Raises:
            ValueError: in training, if there is no teacher. Missing labels are left to the loss.
        """
        needs = as_loss(loss)
        lacks_teacher = self.teacher is None and needs.needs_teacher
        if training and lacks_teacher:
            raise ValueError(
                f"the batch has no {TEACHER_KEY!r} and there is no teacher model, but "
                f"{type(loss).__name__} needs a teacher"
            )
        lacks_labels = self.labels is None and needs.needs_labels
        return training or not (lacks_teacher or lacks_labels)

    def counted(self) -> Tensor:
        """Counted positions and sequences of what the teacher is compared at, ``(2,)``."""
        if self.common is not None:
            return count_items(self.common)
        return counted_items(self.student["logits"], self.labels, self.mask)

    def parts(self, loss: nn.Module, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The parts of the loss that are means over different positions, and the counted items.

        Args:
            loss: the objective.
            value: its value.
        """
        needs = as_loss(loss)
        mixed = self.common is not None and needs.needs_teacher and needs.needs_labels
        if not mixed or needs.reductions == {"sum"}:
            return [(value, self.counted())]
        # A mean over infinitely many items is 0.
        none = ItemCounts(*torch.full((2,), torch.inf))
        labelled = counted_items(self.student["logits"], self.labels, self.mask)
        return [
            (self.value(loss, none, None), self.counted()),
            (self.value(loss, None, none), labelled),
        ]

    def value(
        self, loss: nn.Module, items: Items | None, common_items: Items | None = None
    ) -> Tensor:
        """The loss of the batch, divided by ``items`` if its reduction is a mean.

        Args:
            loss: the objective.
            items: of the positions of the student.
            common_items: of those at which a teacher with its own tokenizer is known.
        """
        if "sequence_mean" not in as_loss(loss).reductions:
            # Losses of other libraries accept only this number.
            items, common_items = (
                each.positions if isinstance(each, ItemCounts) else each
                for each in (items, common_items)
            )
        student, teacher = self.student, self.teacher
        options: dict[str, Any] = {"labels": self.labels, "mask": self.mask}
        if teacher is not None and "features" in teacher:
            options["student_features"] = student["features"]
            options["teacher_features"] = teacher["features"]
        given = None if teacher is None else teacher["logits"]
        if given is not None and self.places is not None and self.common is not None:
            given = TeacherAtPositions(given, self.places, self.common, common_items)
        return call_loss(loss, student["logits"], given, num_items_in_batch=items, **options)
