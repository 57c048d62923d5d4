"""The catalogue of tasks: classification, and causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from otkd.checks import did_you_mean


class DataError(ValueError):
    """Rows that cannot be read, or a task that does not exist; the message says what to do."""


@dataclass(frozen=True)
class Task:
    """A classification task with one or two sentences per row.

    Attributes:
        name: the name on the command line.
        title: the name in tables, and the folder's name in GLUE's layout.
        sentences: the one or two sentence columns, as named on the Hugging Face hub.
        label_names: the classes in the order of their ids.
        metrics: metric names (see :mod:`otkd.tasks.metrics`), the main one first.
        dev_splits: names of the development splits. With more than one, each metric is reported
            for each split as ``split_metric``, and that of the first split is the headline.
    """

    name: str
    title: str
    sentences: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    dev_splits: tuple[str, ...] = ("dev",)

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    @property
    def headline(self) -> str:
        """The key of the main metric in a result."""
        return self.metric_key(self.dev_splits[0], self.metrics[0])

    def metric_key(self, split: str, metric: str) -> str:
        """The key of ``metric`` on ``split``."""
        return metric if len(self.dev_splits) == 1 else f"{split}_{metric}"

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings of a study that differ from the usual ones: none."""
        return {}


# A causal language model is trained longer per row than a classifier, and has no new head.
LANGUAGE_DEFAULTS = MappingProxyType(
    {
        "finetune_teacher": False,
        "student_layers": 6,
        "epochs": 1,
        "batch_size": 4,
        "teacher_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup": 0.05,
        "teacher_learning_rate": 1e-5,
        "freeze_embeddings": False,
        "group_by_length": False,
        "temperature": 1.0,
        "alpha": 1.0,
    }
)


@dataclass(frozen=True)
class LanguageTask:
    """Next-token prediction on texts, or on the answers to instructions.

    Attributes:
        name: the name on the command line.
        title: the name in tables.
        max_length: the default length of a row in tokens.
        instructions: whether only the tokens of answers count, and not those of instructions.
        rows: the default numbers of training and development rows, by setting; all if empty.
        headline: the key of the main metric in a result, which is better if it is lower.
    """

    name: str
    title: str
    max_length: int
    instructions: bool = False
    rows: Mapping[str, int] = field(default_factory=dict)
    headline: str = "cross_entropy"

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings of a study that differ from the usual ones."""
        return {**LANGUAGE_DEFAULTS, **self.rows, "max_length": self.max_length}


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

_TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("mcc",)),
        Task("sst2", "SST-2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        Task(
            "mnli",
            "MNLI",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("matched", "mismatched"),
        ),
        Task("mrpc", "MRPC", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        Task("rte", "RTE", _PAIR, _ENTAILMENT, ("accuracy",)),
        Task("qnli", "QNLI", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
        Task(
            "qqp",
            "QQP",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
        ),
        Task("wnli", "WNLI", _PAIR, ("not_entailment", "entailment"), ("accuracy",)),
        Task(
            "rotten-tomatoes", "Rotten Tomatoes", ("text",), ("negative", "positive"), ("accuracy",)
        ),
        LanguageTask(
            "reviews", "IMDB reviews", 64, rows={"max_train_rows": 1200, "max_dev_rows": 128}
        ),
        LanguageTask("text", "Texts", 256),
        LanguageTask("instructions", "Instructions", 256, instructions=True),
    )
}


def task_names() -> tuple[str, ...]:
    """Every task's name on the command line."""
    return tuple(_TASKS)


def get_task(name: str) -> Task | LanguageTask:
    """The task called ``name``; case, hyphens and underscores are ignored (``SST-2``, ``sst2``).

    Raises:
        DataError: if there is no such task; the message suggests the most similar name.
    """
    plain = {_plain(known): known for known in _TASKS}
    wanted = _plain(name)
    if wanted in plain:
        return _TASKS[plain[wanted]]
    hint = did_you_mean(wanted, _TASKS)
    raise DataError(f"There is no task '{name}'{hint} The tasks are {', '.join(_TASKS)}.")


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "")
