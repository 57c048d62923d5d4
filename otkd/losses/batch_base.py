"""What all losses over the samples of a batch share: gathering, and shares as positions."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from otkd.functional.transport import distributions
from otkd.losses.base import Batch, CommonSettings, DistillationLoss, SettingsBesideTemperature
from otkd.losses.gathering import GatheredBatch, spans_processes
from otkd.reductions import ItemCounts, reduce_positions
from otkd.scalars import as_flag

SINKD_TEMPERATURE = 2.0  # of SinKD's public code


class BatchSettings(SettingsBesideTemperature, total=False):
    """What every loss over a batch takes by name, but for its temperature."""

    gather: bool


class BatchLoss(DistillationLoss):
    """A loss of all counted positions together, given as each position's share of b times it.

    The mean of the shares is the value of the batch, so that one reduction serves all losses: with
    ``num_items_in_batch`` the value is scaled by counted/num_items. Microbatches do not add up to
    the whole batch: transport sees the batch.

    Where :mod:`torch.distributed` runs several processes and gradients are recorded, the batch is
    that of all of them: every process has to call the loss, and as often, even one without a
    counted sample; each has the value of the whole batch, and gradients averaged over the processes
    are those of the whole batch. The shares of a process are then centred so that their mean is
    this value. Rows that a sampler repeats to even out the processes, as Accelerate does by
    default, are samples twice. Under ``torch.no_grad()`` the batch is that of each process.

    Args:
        gather: False for the batch of each process by itself.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.
    """

    rescales_by_default = False

    def __init__(self, *, gather: bool = True, **common: Unpack[CommonSettings]) -> None:
        super().__init__(**common)
        self.gather = as_flag("gather", gather)

    def per_position(self, batch: Batch) -> Tensor:
        """Shares ``(*batch,)``, adding up to b times the value of the batch."""
        return _at_positions(_centred(*self._solve(batch)), batch)

    def reduced(self, batch: Batch, num_items_in_batch: int | Tensor | ItemCounts | None) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        value, shares = self._solve(batch)
        if self.reduction == "mean" and num_items_in_batch is None:
            return value  # the mean of the shares
        counts = isinstance(num_items_in_batch, ItemCounts)
        if self.reduction == "sequence_mean" and not len(shares) and not counts:
            # Without a sample of its own a process still has the value, and its part in the
            # average of the gradients.
            return value
        return reduce_positions(
            _at_positions(_centred(value, shares), batch),
            batch.counted,
            reduction=self.reduction,
            num_items_in_batch=num_items_in_batch,
        )

    def _solve(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The value of the batch of all processes, and the shares of the samples of this one."""
        self.last_report = None
        student, teacher = self.points(batch)
        own, everywhere = slice(None), len(student)
        if self.gather and spans_processes():
            gathered = GatheredBatch.of(student, teacher)
            student, teacher = gathered.gather(student), gathered.gather(teacher)
            own, everywhere = gathered.own, sum(gathered.sizes)
        # Without any sample there is nothing to transport; the sum keeps the graph.
        value, shares = (
            self.transport(student, teacher) if everywhere else (student.sum(), student.sum(-1))
        )
        return value, shares[own]

    def points(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The counted samples of student and teacher, ``(b, d)``: their distributions."""
        student, teacher = counted_rows(batch, batch.student_logits, batch.teacher_logits)
        return distributions(
            student,
            teacher,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
        )

    def transport(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The value of a batch of points ``(b, d)``, and the share of each sample, ``(b,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define transport")


def counted_rows(batch: Batch, *values: Tensor) -> list[Tensor]:
    """The rows of each tensor at the positions that count."""
    rows = [value.reshape(-1, value.shape[-1]) for value in values]
    if batch.counted is None:
        return rows
    counted = batch.counted.flatten()
    return [value[counted] for value in rows]


def _centred(value: Tensor, shares: Tensor) -> Tensor:
    """Shares that are exactly the value on average, whatever the marginal error left.

    And with its gradient, in which a process without samples has its part, too.
    """
    return shares - (shares.mean() if len(shares) else 0) + value


def _at_positions(shares: Tensor, batch: Batch) -> Tensor:
    """The shares of the counted samples at their positions, ``(*batch,)``; 0 elsewhere."""
    shape = batch.student_logits.shape[:-1]
    if batch.counted is None:
        return shares.reshape(shape)
    counted = batch.counted.flatten().nonzero().squeeze(-1)
    return shares.new_zeros(shape.numel()).index_copy(0, counted, shares).reshape(shape)
