"""The metrics of all tasks, and those of classification, computed from logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.tasks.tasks import Task


@dataclass(frozen=True)
class Metric:
    """How a metric is named and compared.

    Attributes:
        title: its name for readers.
        fraction: whether it is a fraction of one, which tables multiply by 100. Others are in nats,
            or in units of a ground cost.
        higher_is_better: otherwise lower is.
    """

    title: str
    fraction: bool = True
    higher_is_better: bool = True

    def improvement(self, value: float) -> float:
        """A number that is larger for a better value."""
        return value if self.higher_is_better else -value


_METRICS_BY_NAME = {
    "accuracy": Metric("accuracy"),
    "f1": Metric("F1"),
    "mcc": Metric("MCC"),
    "cross_entropy": Metric("cross-entropy", fraction=False, higher_is_better=False),
    "kl": Metric("KL(p‖q)", fraction=False, higher_is_better=False),
    "reverse_kl": Metric("KL(q‖p)", fraction=False, higher_is_better=False),
    "tvd": Metric("TVD", higher_is_better=False),
    "rouge_l": Metric("Rouge-L"),
    "sinkhorn": Metric("Sinkhorn", fraction=False, higher_is_better=False),
    "bits_per_byte": Metric("bits per byte", fraction=False, higher_is_better=False),
    "next_byte_kl": Metric("KL of the next byte", fraction=False, higher_is_better=False),
}


def get_metric(key: str) -> Metric:
    """The metric that a key of a result stands for: ``f1``, or ``matched_accuracy``.

    Raises:
        KeyError: if there is none.
    """
    if key in _METRICS_BY_NAME:
        return _METRICS_BY_NAME[key]
    split, _, name = key.rpartition("_")
    metric = _METRICS_BY_NAME[name]
    return Metric(f"{metric.title} ({split})", metric.fraction, metric.higher_is_better)


def _accuracy(predictions: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    from torchmetrics.functional.classification import multiclass_accuracy

    return multiclass_accuracy(predictions, labels, num_classes=num_labels, average="micro")


def _f1(predictions: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    from torchmetrics.functional.classification import binary_f1_score

    return binary_f1_score(predictions, labels)


def _mcc(predictions: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    from torchmetrics.functional.classification import multiclass_matthews_corrcoef

    # If one side is constant the coefficient is 0/0. GLUE counts this as 0; torchmetrics gives the
    # limit of a small perturbation, which rewards always answering the larger class.
    if len(predictions.unique()) == 1 or len(labels.unique()) == 1:
        return torch.zeros(())
    return multiclass_matthews_corrcoef(predictions, labels, num_classes=num_labels)


_METRICS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "mcc": _mcc,
}


def score(
    task: Task, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> dict[str, float]:
    """All metrics of a task, between 0 and 1; the main one is ``task.headline``.

    Args:
        task: the task.
        logits: ``(rows, num_labels)`` by development split.
        labels: ``(rows,)`` by development split.

    Raises:
        KeyError: if a development split of the task is missing.
    """
    return {
        task.metric_key(split, metric): float(
            _METRICS[metric](logits[split].argmax(-1), labels[split], task.num_labels)
        )
        for split in task.dev_splits
        for metric in task.metrics
    }


def majority_score(task: Task, train: Tensor, labels: Mapping[str, Tensor]) -> dict[str, float]:
    """The score of always predicting the class that is most frequent in training.

    Args:
        task: the task.
        train: ``(rows,)`` labels of the training rows; among equally frequent classes the first is
            used.
        labels: ``(rows,)`` by development split.

    Raises:
        KeyError: if a development split of the task is missing.
    """
    classes = torch.bincount(train, minlength=task.num_labels)
    answer = torch.nn.functional.one_hot(classes.argmax(), task.num_labels)
    logits = {split: answer.expand(len(rows), -1) for split, rows in labels.items()}
    return score(task, logits, labels)


def agreement(first: Tensor, second: Tensor) -> float:
    """The share of rows for which two ``(rows, num_labels)`` logits predict the same class.

    Raises:
        ValueError: if the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"logits of shapes {tuple(first.shape)} and {tuple(second.shape)}")
    return (first.argmax(-1) == second.argmax(-1)).float().mean().item()
