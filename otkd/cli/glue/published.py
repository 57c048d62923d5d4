"""The published figures, by loss, task and metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from otkd.cli.protocols import load_published
from otkd.tasks.tasks import Task, get_task


@dataclass(frozen=True)
class Published:
    """A published table.

    Attributes:
        source: where it stands.
        tasks: its tasks, in its order.
        scores: fractions of one, by loss, task and metric.
        unconfirmed: the losses whose figures are quoted from elsewhere.
        pair: names of teacher and student, where the file has them.
    """

    source: str
    tasks: tuple[str, ...]
    scores: Mapping[tuple[str, str, str], float]
    unconfirmed: frozenset[str]
    pair: Mapping[str, str]

    def difference(self, loss: str, baseline: str, task: str, metric: str) -> float | None:
        """By how much ``loss`` is above ``baseline``; None where one of them is not published."""
        first, second = (self.scores.get((name, task, metric)) for name in (loss, baseline))
        return None if first is None or second is None else first - second


def published_metrics(task: Task) -> tuple[str, ...]:
    """The metrics of a task that are published: its first, on each development split."""
    return tuple(task.metric_key(split, task.metrics[0]) for split in task.dev_splits)


def read_published(content: Mapping[str, Any] | None = None) -> Published:
    """Read the figures that come with the protocols, or ``content`` of the same form."""
    content = load_published() if content is None else content
    tasks = tuple(get_task(name).name for name in content["tasks"])
    unconfirmed = content.get("unconfirmed", {})
    scores = {}
    for loss, row in {**content["scores"], **unconfirmed}.items():
        for task, value in zip(tasks, row, strict=True):
            metrics = published_metrics(get_task(task))
            values = value if isinstance(value, list) else [value]
            for metric, score in zip(metrics, values, strict=True):
                scores[loss, task, metric] = score / 100
    return Published(
        content["source"], tasks, scores, frozenset(unconfirmed), content.get("pair", {})
    )
