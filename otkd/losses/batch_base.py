"""Base of the losses over the samples of a batch: gathering, and shares of the samples."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from otkd.functional.wasserstein import distributions
from otkd.losses.base import Batch, DistillationLoss
from otkd.losses.gathering import GatheredBatch, spans_processes
from otkd.losses.settings import CommonSettings, SettingsBesideTemperature
from otkd.reductions import ItemCounts, reduce_positions
from otkd.scalars import as_flag

SINKD_TEMPERATURE = 2.0  # of SinKD's public code


class BatchSettings(SettingsBesideTemperature, total=False):
    """The common keyword arguments of every loss over a batch, except its temperature."""

    gather: bool


class BatchLoss(DistillationLoss):
    """A loss over the whole batch.

    ``per_position`` returns contributions of the samples ("shares") whose mean is the batch loss,
    so that reductions work as for other losses. With ``num_items_in_batch`` the value is multiplied
    by counted/num_items. Microbatches do not add up to the whole batch, because each is a batch of
    its own.

    If :mod:`torch.distributed` runs several processes and gradients are recorded, the batch
    consists of the samples of all processes. Every process must then call the loss equally often,
    even without a counted sample. Each process gets the value of the global batch, and gradients
    averaged over the processes are those of the global batch. The shares of a process are shifted
    so that their mean is that value. Rows that a sampler repeats to give all processes equally many
    (as Accelerate does by default) are counted twice. Under ``torch.no_grad()`` every process uses
    its own batch.

    Args:
        gather: with False every process uses its own batch.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.
    """

    rescales_by_default = False

    def __init__(self, *, gather: bool = True, **common: Unpack[CommonSettings]) -> None:
        super().__init__(**common)
        self.gather = as_flag("gather", gather)

    def per_position(self, batch: Batch) -> Tensor:
        """The shares of the samples, ``(*batch,)``, which add up to b times the batch loss."""
        return _at_positions(_centred(*self._solve(batch)), batch)

    def reduced(self, batch: Batch, num_items_in_batch: int | Tensor | ItemCounts | None) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        value, shares = self._solve(batch)
        if self.reduction == "mean" and num_items_in_batch is None:
            return value  # the mean of the shares
        counts = isinstance(num_items_in_batch, ItemCounts)
        if self.reduction == "sequence_mean" and not len(shares) and not counts:
            # A process without samples still returns the value, and takes part in averaging
            # the gradients.
            return value
        return reduce_positions(
            _at_positions(_centred(value, shares), batch),
            batch.counted,
            reduction=self.reduction,
            num_items_in_batch=num_items_in_batch,
        )

    def _solve(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The value of the batch of all processes, and the shares of this process's samples."""
        self.last_report = None
        student, teacher = self.points(batch)
        own, everywhere = slice(None), len(student)
        if self.gather and spans_processes():
            gathered = GatheredBatch.of(student, teacher)
            student, teacher = gathered.gather(student), gathered.gather(teacher)
            own, everywhere = gathered.own, sum(gathered.sizes)
        # Without a sample there is nothing to transport; the sum keeps the graph.
        value, shares = (
            self.transport(student, teacher) if everywhere else (student.sum(), student.sum(-1))
        )
        return value, shares[own]

    def points(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The distributions of the counted samples of student and teacher, ``(b, d)``."""
        student, teacher = counted_rows(batch, batch.student_logits, batch.teacher_logits)
        return distributions(
            student,
            teacher,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
        )

    def transport(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The value for points ``(b, d)`` of both sides, and the share of each sample, ``(b,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define transport")


def counted_rows(batch: Batch, *values: Tensor) -> list[Tensor]:
    """The rows of each tensor at the positions that count."""
    rows = [value.reshape(-1, value.shape[-1]) for value in values]
    if batch.counted is None:
        return rows
    counted = batch.counted.flatten()
    return [value[counted] for value in rows]


def _centred(value: Tensor, shares: Tensor) -> Tensor:
    """The shares, shifted so that their mean is exactly the value despite the marginal error.

    Their gradient includes that of the value, also in a process without samples.
    """
    return shares - (shares.mean() if len(shares) else 0) + value


def _at_positions(shares: Tensor, batch: Batch) -> Tensor:
    """The shares of the counted samples at their positions, ``(*batch,)``; 0 elsewhere."""
    shape = batch.student_logits.shape[:-1]
    if batch.counted is None:
        return shares.reshape(shape)
    counted = batch.counted.flatten().nonzero().squeeze(-1)
    return shares.new_zeros(shape.numel()).index_copy(0, counted, shares).reshape(shape)
