"""The call that every loss shares: checks, temperature, mask, reduction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from otkd.checks import check_choice, check_logits, check_one_logits, check_positive
from otkd.reductions import REDUCTIONS, counted_positions, reduce_positions
from otkd.signals import TeacherSignal, teacher_logits_of


@dataclass(frozen=True)
class Batch:
    """What a loss is computed from, checked.

    Attributes:
        student_logits: ``(*batch, vocab)``.
        teacher_logits: ``(*batch, teacher_vocab)``, detached; given where the loss needs it.
        counted: boolean ``(*batch,)``, or None where every position counts.
        labels: ``(*batch,)``; given where the loss needs them.
        student_features: ``(*batch, width)`` or None.
        teacher_features: ``(*batch, teacher_width)`` or None.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    counted: Tensor | None
    labels: Tensor
    student_features: Tensor | None = None
    teacher_features: Tensor | None = None


class DistillationLoss(nn.Module, ABC):
    """Base of the losses that are a value per position, reduced.

    A subclass computes :meth:`per_position`; this class owns everything around it.

    Args:
        temperature: divides the logits of student and teacher.
        teacher_temperature: divides the teacher's logits instead, where given.
        rescale_t2: multiply by the square of ``temperature``. The default is True for losses whose
            logit gradient falls as 1/T² and False for the others.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"sequence_mean"``; see
            :func:`otkd.reductions.reduce_positions`.
        vocab_size: number of real tokens where the logits are padded; both are sliced there.

    Attributes:
        last_report: what the solver did in the last call; None for losses without a solver.
    """

    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    rescales_by_default: ClassVar[bool] = True

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        rescale_t2: bool | None = None,
        reduction: str = "mean",
        vocab_size: int | None = None,
    ):
        super().__init__()
        check_positive(temperature=temperature)
        if teacher_temperature is not None:
            check_positive(teacher_temperature=teacher_temperature)
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size!r}")
        check_choice("reduction", reduction, REDUCTIONS)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.rescale_t2 = self.rescales_by_default if rescale_t2 is None else rescale_t2
        self.reduction = reduction
        self.vocab_size = vocab_size
        self.last_report = None

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether student and teacher may have vocabularies of different size."""
        return False

    @abstractmethod
    def per_position(self, batch: Batch) -> Tensor:
        """Values ``(*batch,)``, 0 where a position does not count; neither rescaled nor reduced."""

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TeacherSignal | None = None,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        student_features: Tensor | None = None,
        teacher_features: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            student_logits: ``(*batch, vocab)``. Losses never shift: give the logits of the
                positions that the labels are for.
            teacher_logits: ``(*batch, vocab)``, or a stored teacher signal. A constant.
            labels: ``(*batch,)``; positions labelled −100 do not count. Needed by hard-label
                terms alone.
            mask: ``(*batch,)``, true or non-zero where a position counts. Other positions may hold
                anything.
            num_items_in_batch: replaces the number of counted positions in a mean, so that
                microbatches add up to the whole batch.
            student_features: ``(*batch, width)``, for losses over representations.
            teacher_features: ``(*batch, teacher_width)``, for losses over representations.

        Returns:
            A scalar, or ``(*batch,)`` with ``reduction="none"``; float32, or float64 for float64
            logits.

        Raises:
            TypeError, ValueError: for missing or ill-shaped input, and NaN in a counted position.
        """
        batch = self._prepare(
            student_logits, teacher_logits, labels, mask, student_features, teacher_features
        )
        values = self.per_position(batch)
        if self.rescale_t2 and self.temperature != 1:
            values = values * self.temperature**2
        return reduce_positions(
            values,
            batch.counted,
            reduction=self.reduction,
            num_items_in_batch=num_items_in_batch,
        )

    def _prepare(
        self, student_logits, teacher_logits, labels, mask, student_features, teacher_features
    ) -> Batch:
        name = type(self).__name__
        check_one_logits("student_logits", student_logits)
        if self.needs_labels and labels is None:
            raise ValueError(f"{name} has a hard-label term: pass labels=")
        if self.needs_features and (student_features is None or teacher_features is None):
            raise ValueError(f"{name} needs student_features= and teacher_features=")
        teacher = None
        if self.needs_teacher:
            if teacher_logits is None:
                raise ValueError(f"{name} needs teacher_logits: a tensor or a stored TeacherSignal")
            teacher = teacher_logits_of(teacher_logits, student_logits.device)
            sliced = self.vocab_size is not None
            same_vocabulary = not (sliced or self.bridges_vocabularies)
            check_logits(student_logits, teacher, same_vocabulary=same_vocabulary)
            teacher = self._slice(teacher)
        student = self._slice(student_logits)
        return Batch(
            student,
            teacher,  # pyright: ignore[reportArgumentType]  (checked above where needed)
            counted_positions(tuple(student.shape[:-1]), mask, labels),
            labels,  # pyright: ignore[reportArgumentType]
            student_features,
            teacher_features,
        )

    def _slice(self, logits: Tensor) -> Tensor:
        if self.vocab_size is None:
            return logits
        if logits.shape[-1] < self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} is more than the {logits.shape[-1]} logits given"
            )
        return logits[..., : self.vocab_size]

    def extra_repr(self) -> str:
        """The common settings."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
