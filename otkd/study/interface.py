"""What a kind of task defines for the study of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.study.teachers import Teacher
    from otkd.teachers import StoredTeacher


@dataclass(frozen=True)
class Rows:
    """The rows of a training and those that score it, encoded for a model.

    Attributes:
        train: training rows.
        dev: development rows by split, as :meth:`Experiment.prepared` makes them.
        index: places of the training rows among the task's, if they are only a part.
        held_out: likewise the places of training rows used instead of each development split.
    """

    train: Dataset
    dev: Mapping[str, Any]
    index: list[int] | None = None
    held_out: list[int] | None = None

    def counts(self) -> dict[str, int]:
        """Number of rows, for result files."""
        return {"train": len(self.train), "dev": sum(map(len, self.dev.values()))}


@dataclass(frozen=True)
class Outputs:
    """What a teacher is stored as.

    Attributes:
        train: one entry per training row.
        dev: one entry per development row, the splits one after the other.
        embedding: its class or token embeddings, one row each.
    """

    train: StoredTeacher
    dev: StoredTeacher
    embedding: Tensor


class TaskKind(ABC):
    """The parts of an :class:`~otkd.study.experiment.Experiment` that its kind of task decides."""

    default_teacher: ClassVar[str]
    """The name of the teacher in result files if the user names none."""
    pads_with_end: ClassVar[bool] = False
    """Whether the end-of-sequence token pads if a tokenizer has no padding token."""
    outputs: ClassVar[tuple[str, ...]]
    """The files of a teacher's outputs, that of the training rows first."""

    @abstractmethod
    def _check_objectives(self) -> None:
        """Raise ``StudyError`` for a loss that cannot be built, or not for such a task."""

    @abstractmethod
    def _load_data(self) -> Any:
        """The rows: ``train``, ``dev`` by split, ``dev_rows`` and ``digest()``."""

    @abstractmethod
    def _teacher_source(self) -> str:
        """The argument of ``from_pretrained`` for the teacher."""

    @abstractmethod
    def _student_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that writes the rows of a student, and is saved with it."""

    @abstractmethod
    def _check_teacher(self) -> None:
        """Raise ``StudyError`` for a teacher that cannot be used as the settings say."""

    @abstractmethod
    def _least_length(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
        """The smallest length of an input, and the reason for a message."""

    @abstractmethod
    def load_teacher(self, source: str) -> PreTrainedModel:
        """The teacher before its fine-tuning, or from its folder after it."""

    @abstractmethod
    def build_student(self, seed: int) -> PreTrainedModel:
        """A student before its training; only a new head depends on the seed."""

    @abstractmethod
    def encoded(self, rows: Any, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Rows as tokens, with ``labels`` and ``length``, without padding."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Pads a batch of encoded rows."""

    @property
    def trainer_options(self) -> dict[str, Any]:
        """Further arguments of the trainer of a student."""
        return {}

    @abstractmethod
    def prepared(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Encoded rows ready for the evaluation of many models; has a length."""

    @abstractmethod
    def score(self, model: PreTrainedModel, rows: Rows, teacher: Teacher) -> dict[str, float]:
        """The metrics of a student on the development rows; ``FloatingPointError`` for NaN.

        Among them is ``agreement``: how often student and teacher predict the same.
        """

    def final_metrics(
        self, model: PreTrainedModel, on_steps: Callable[[int], None]
    ) -> dict[str, float]:
        """Metrics that take so long that they are measured only after the last step.

        Args:
            model: the student.
            on_steps: counts the :attr:`final_steps`.
        """
        return {}

    @property
    def final_steps(self) -> int:
        """Steps of progress of :meth:`final_metrics`."""
        return 0

    @abstractmethod
    def store_outputs(
        self, model: PreTrainedModel, folder: Path, work: Path, on_steps: Callable[[int], None]
    ) -> dict[str, Any]:
        """Write the :attr:`outputs` of a teacher to ``folder``; returns its metrics for a result.

        These are ``metrics`` and, if there is such a baseline, ``majority_metrics``.

        Args:
            model: the teacher.
            folder: for the outputs.
            work: a folder in which an interrupted computation is continued.
            on_steps: counts the :attr:`output_steps`.
        """

    @property
    def output_steps(self) -> int:
        """Steps of progress of :meth:`store_outputs`; 0 if it takes a short time."""
        return 0

    @abstractmethod
    def load_outputs(self, folder: Path) -> Outputs:
        """The outputs in ``folder``; ``ValueError`` if they are not of these rows."""
