"""What a loss compares in a batch, and the call of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from otkd.integrations.stored import TEACHER_KEY
from otkd.losses.protocol import as_loss, teacher_for
from otkd.reductions import ItemCounts


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
    """

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Any] | None
    labels: Tensor | None
    mask: Tensor | None
    predictions: Tensor
    auxiliary: Tensor | None

    def first(self, examples: int, packed: Tensor | None = None) -> Comparison:
        """The comparison of the first ``examples``; the predictions stay whole.

        Args:
            examples: how many.
            packed: the lengths of all examples if they are one row.
        """
        index: Any = slice(examples)
        if packed is not None:
            index = (slice(min(examples, 1)), slice(int(packed[:examples].sum())))
        labels, mask = (None if x is None else x[index] for x in (self.labels, self.mask))
        return replace(
            self,
            student={name: values[index] for name, values in self.student.items()},
            teacher=self.teacher and {name: x[index] for name, x in self.teacher.items()},
            labels=labels,
            mask=mask,
        )

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

    def value(self, loss: nn.Module, items: ItemCounts | Tensor | float | None) -> Tensor:
        """The loss of the batch, divided by ``items`` if its reduction is a mean."""
        if isinstance(items, ItemCounts) and "sequence_mean" not in as_loss(loss).reductions:
            items = items.positions  # losses of other libraries accept only this number
        student, teacher = self.student, self.teacher
        options: dict[str, Any] = {"labels": self.labels, "mask": self.mask}
        if teacher is not None and "features" in teacher:
            options["student_features"] = student["features"]
            options["teacher_features"] = teacher["features"]
        stored = None if teacher is None else teacher["logits"]
        given = teacher_for(loss, stored, student["logits"])
        return loss(student["logits"], given, num_items_in_batch=items, **options)
