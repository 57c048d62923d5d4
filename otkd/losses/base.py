"""The call that all losses share: checks, temperature, mask and reduction."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from otkd.checks import check_choice, check_logits, check_one_logits
from otkd.compilation import outside_graphs
from otkd.functional.report import Report
from otkd.losses.settings import WholeSignature, as_pair, unknown_argument
from otkd.reductions import REDUCTIONS, ItemCounts, counted_positions, reduce_positions
from otkd.scalars import as_flag, as_positive
from otkd.teachers import StoredTeacher, TopKTeacher, teacher_logits_of
from otkd.teachers.beside import evenly_spread_logits, logits_shaped_by
from otkd.teachers.protocol import teacher_features_of


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The checked arguments of a call.

    Attributes:
        student_logits: ``(*batch, vocab)``.
        teacher_logits: ``(*batch, teacher_vocab)``, detached. None if the loss needs no teacher.
        counted: boolean ``(*batch,)``, or None if every position counts.
        labels: ``(*batch,)``. May be None if the loss needs no labels.
        student_features: ``(*batch, width)`` or None.
        teacher_features: ``(*batch, teacher_width)`` or None.
        stored: the stored top-k teacher, for losses that read it. ``teacher_logits`` then have the
            right shape and hold NaN.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    counted: Tensor | None
    labels: Tensor
    student_features: Tensor | None = None
    teacher_features: Tensor | None = None
    stored: TopKTeacher | None = None


class DistillationLoss(nn.Module, ABC):
    """Base of the losses that compute one value per position and reduce them.

    A subclass implements :meth:`per_position`. This class checks the arguments, applies T² and the
    reduction, and implements the protocol :class:`~otkd.losses.protocol.Loss`.

    Args:
        temperature: divides the logits of student and teacher.
        teacher_temperature: if given, divides the teacher's logits instead.
        rescale_t2: multiply by the square of ``temperature``. The default is True for losses whose
            logit gradient falls as 1/T² and False for the others.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"sequence_mean"``; see
            :func:`otkd.reductions.reduce_positions`.
        vocab_size: number of real tokens if the logits are padded: logits beyond it are ignored,
            and their gradient is 0. A pair ``(student, teacher)`` for a loss between two
            vocabularies.

    Attributes:
        last_report: what the solver did in the last call; None for losses without a solver.
    """

    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    reads_stored: ClassVar[bool] = False
    rescales_by_default: ClassVar[bool] = True

    __signature__ = WholeSignature()

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        rescale_t2: bool | None = None,
        reduction: str = "mean",
        vocab_size: int | tuple[int, int] | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            known = inspect.signature(type(self)).parameters
            raise TypeError(unknown_argument(type(self).__name__, next(iter(unknown)), known))
        self.temperature = as_positive("temperature", temperature)
        self.teacher_temperature = teacher_temperature
        if teacher_temperature is not None:
            self.teacher_temperature = as_positive("teacher_temperature", teacher_temperature)
        if rescale_t2 is None:
            rescale_t2 = self.rescales_by_default
        self.rescale_t2 = as_flag("rescale_t2", rescale_t2)
        if vocab_size is not None:
            as_pair(vocab_size)
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction = reduction
        self.vocab_size = vocab_size
        self.last_report: Report | None = None

    @property
    def needs_features(self) -> bool:
        """Whether the loss compares features, which the call then needs."""
        return False

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether student and teacher may have vocabularies of different size."""
        return False

    @property
    def reductions(self) -> frozenset[str]:
        """Its reduction."""
        return frozenset({self.reduction})

    @property
    def last_reports(self) -> dict[str, Report]:
        """Its own report, if there is one, under the empty name: it has no terms."""
        return {} if self.last_report is None else {"": self.last_report}

    @property
    def last_terms(self) -> dict[str, Tensor]:
        """Empty: it has no terms."""
        return {}

    @abstractmethod
    def per_position(self, batch: Batch) -> Tensor:
        """Values ``(*batch,)``, 0 where a position does not count; neither rescaled nor reduced."""

    @outside_graphs
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | StoredTeacher | None = None,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | ItemCounts | None = None,
        student_features: Tensor | None = None,
        teacher_features: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            student_logits: ``(*batch, vocab)``. Losses do not shift: for a causal language model,
                pass the logits of the positions that predict the labels.
            teacher_logits: ``(*batch, vocab)``, or a stored teacher. No gradient flows to it.
            labels: ``(*batch,)``. Positions with label −100 do not count. Only hard-label terms
                require labels.
            mask: ``(*batch,)``, true or non-zero where a position counts. Other positions may hold
                any value, including NaN.
            num_items_in_batch: replaces the number of counted positions in a mean, so that
                microbatches add up to the whole batch. For ``reduction="sequence_mean"`` pass an
                :class:`~otkd.reductions.ItemCounts`, which includes the number of sequences.
            student_features: ``(*batch, width)``, for losses that compare features.
            teacher_features: ``(*batch, teacher_width)``, for losses that compare features; by
                default those of a stored teacher with features.

        Returns:
            A scalar, or ``(*batch,)`` with ``reduction="none"``; float32, or float64 for float64
            logits.

        Raises:
            TypeError, ValueError: for missing arguments, wrong shapes, or NaN where it counts.
        """
        batch = self._prepare(
            student_logits, teacher_logits, labels, mask, student_features, teacher_features
        )
        value = self.reduced(batch, num_items_in_batch)
        if self.rescale_t2 and self.temperature != 1:
            value = value * self.temperature**2
        return value

    def reduced(self, batch: Batch, num_items_in_batch: int | Tensor | ItemCounts | None) -> Tensor:
        """The values of the positions, reduced but not multiplied by T²."""
        return reduce_positions(
            self.per_position(batch),
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
        if teacher_features is None:
            teacher_features = teacher_features_of(teacher_logits, student_logits.device)
        if self.needs_features and (student_features is None or teacher_features is None):
            raise ValueError(f"{name} needs student_features= and teacher_features=")
        counted = counted_positions(tuple(student_logits.shape[:-1]), mask, labels)
        teacher = topk = stored = None
        if self.needs_teacher:
            if teacher_logits is None:
                raise ValueError(f"{name} needs teacher_logits: a tensor or a stored teacher")
            if isinstance(teacher_logits, TopKTeacher):
                topk = teacher_logits.to(student_logits.device)
                teacher = topk.without_logits()
            else:
                teacher = teacher_logits_of(teacher_logits, student_logits.device)
            sliced = self.vocab_size is not None
            same_vocabulary = not (sliced or self.bridges_vocabularies)
            check_logits(student_logits, teacher, same_vocabulary=same_vocabulary)
            teacher = self._slice(teacher, 1)
        student = self._slice(student_logits, 0)
        if teacher is not None and not self.bridges_vocabularies:
            self._check_one_vocabulary(student.shape[-1], teacher.shape[-1])
        if topk is not None and teacher is not None:
            topk.check_temperature(self.teacher_temperature or self.temperature)
            stored = topk.validate(counted).sliced(teacher.shape[-1], counted)
            if not self.reads_stored:
                teacher, stored = self._expanded(stored, student), None
        return Batch(
            student_logits=student,
            teacher_logits=teacher,  # pyright: ignore[reportArgumentType]  (checked where needed)
            counted=counted,
            labels=labels,  # pyright: ignore[reportArgumentType]
            student_features=student_features,
            teacher_features=teacher_features,
            stored=stored,
        )

    def _expanded(self, stored: TopKTeacher, student: Tensor) -> Tensor:
        """Dense logits of a stored teacher, for a loss that compares all tokens."""
        if self.bridges_vocabularies:
            return evenly_spread_logits(stored)
        return logits_shaped_by(stored, student, self.temperature)

    def _slice(self, logits: Tensor, side: int) -> Tensor:
        if self.vocab_size is None:
            return logits
        size = as_pair(self.vocab_size)[side]
        if logits.shape[-1] < size:
            raise ValueError(
                f"vocab_size={self.vocab_size} is larger than the {logits.shape[-1]} logits of the "
                f"{('student', 'teacher')[side]}"
            )
        return logits[..., :size]

    def _check_one_vocabulary(self, student: int, teacher: int) -> None:
        if student != teacher:
            raise ValueError(
                f"vocab_size={self.vocab_size} leaves the student {student} tokens and the teacher "
                f"{teacher}, but this {type(self).__name__} needs one vocabulary. For two "
                "vocabularies use PushforwardLoss, SinkhornLoss with EmbeddingCost("
                "student_embedding, teacher_embedding), or UniversalLogitLoss"
            )

    def extra_repr(self) -> str:
        """The common settings."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
