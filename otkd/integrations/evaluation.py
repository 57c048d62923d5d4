"""The values of an evaluation, averaged over all counted items in all processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from otkd.integrations.counting import counted_items
from otkd.integrations.tally import Tally
from otkd.losses.protocol import Loss
from otkd.precision import compute_dtype
from otkd.reductions import IGNORE_INDEX


class Evaluation:
    """The loss and the hard-label cross-entropy of an evaluation set.

    Means are over counted positions, independent of batches and processes: a loss that is a sum
    over positions has the value of the whole set as one batch. For means over sequences, batches
    are weighted by their counted sequences. Sums are added.

    Args:
        loss: its reduction decides how values are combined.
        accelerator: of the trainer; it knows which rows were repeated.
    """

    def __init__(self, loss: Loss, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._reductions = loss.reductions
        self._tally = Tally()
        self._has_labels: bool | None = None

    def own_examples(self, examples: int) -> int:
        """How many at the start of this batch, which has ``examples``, are not repetitions.

        If the last batch cannot be divided evenly, Accelerate fills it with the first examples of
        the set. These come after those of the last process that still has some of its own.
        """
        state = self._accelerator.gradient_state
        one = self._accelerator.num_processes == 1
        if one or not state.end_of_dataloader or state.remainder <= 0:
            return examples
        return min(max(state.remainder - self._accelerator.process_index * examples, 0), examples)

    def see(self, logits: Tensor, labels: Tensor | None) -> None:
        """Record the cross-entropy of a batch if there are class labels.

        Args:
            logits: of the student.
            labels: as the loss gets them.
        """
        if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            return
        self._tally.add("labelled batches", 1.0)
        positions, _ = counted_items(logits, labels, None)
        self._tally.add_mean("cross_entropy", cross_entropy(logits, labels, "sum"), positions)

    def add(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add the loss of a batch.

        Args:
            parts: they add up to the loss; each with the counted items ``(2,)`` of its mean.
        """
        self._tally.add("batches", 1.0)
        for number, (value, (positions, sequences)) in enumerate(parts):
            weight = sequences if self._reductions == {"sequence_mean"} else positions
            # A batch without counted items has no value, not even NaN.
            value = torch.where(weight > 0, value.detach(), 0.0)
            if self._reductions == {"sum"}:
                self._tally.add(f"part {number}", value)
            else:
                self._tally.add_mean(f"part {number}", value * weight, weight)

    def metrics(self) -> dict[str, float]:
        """``loss``, and ``cross_entropy`` if there are labels; every process must call this.

        The loss is the cross-entropy if no batch had the teacher that the trainer's loss needs.
        Both are NaN if nothing counts.
        """
        found, nan = self._tally.take(), float("nan")
        metrics = {}
        if found.pop("labelled batches", 0):
            metrics["loss"] = metrics["cross_entropy"] = found.get("cross_entropy", nan)
        if found.pop("batches", 0):
            parts = [value for name, value in found.items() if name.startswith("part ")]
            metrics["loss"] = sum(parts) if parts else nan
        return metrics

    def labels_of_all(self, labels: Tensor | None, logits: Tensor) -> Tensor | None:
        """The labels of a batch, so that either all processes and batches have labels or none has.

        If only other processes or earlier batches have labels, the result is −100 everywhere.

        Raises:
            ValueError: for labels after batches without labels: predictions and labels could not be
                matched.
        """
        mine = torch.tensor([labels is not None], device=logits.device)
        anywhere = bool(cast("Tensor", self._accelerator.gather(mine)).any())
        if self._has_labels is False and anywhere:
            raise ValueError(
                "the evaluation set has batches without labels before batches with labels, so "
                "predictions cannot be matched with labels: give labels to every example "
                f"({IGNORE_INDEX} where it has none), or to none"
            )
        self._has_labels = self._has_labels or anywhere
        if labels is None and self._has_labels:
            shape = logits.shape[:-1]
            return torch.full(shape, IGNORE_INDEX, dtype=torch.long, device=logits.device)
        return labels


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Hard-label cross-entropy over the labels that are not −100, in at least float32."""
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).to(compute_dtype(logits)),
        labels.flatten().long(),
        ignore_index=IGNORE_INDEX,
        reduction=reduction,
    )
