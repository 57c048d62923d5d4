"""Losses that transport the samples of a batch: they see the batch, not the position."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from typing_extensions import Unpack

from otkd.checks import check_choice
from otkd.functional.batch_transport import (
    BATCH_COSTS,
    point_distances,
    transport_between_points,
)
from otkd.functional.transport import distributions
from otkd.losses.base import Batch, CommonSettings, DistillationLoss, SettingsBesideTemperature
from otkd.losses.gathering import GatheredBatch, spans_processes
from otkd.ot.options import Options
from otkd.precision import compute_dtype, without_autocast
from otkd.reductions import ItemCounts, reduce_positions
from otkd.scalars import as_flag, as_not_negative, as_positive, as_whole
from otkd.tensors import check_floating

_TEMPERATURE = 2.0  # of SinKD's public code


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
        student, teacher = _counted(batch, batch.student_logits, batch.teacher_logits)
        return distributions(
            student,
            teacher,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
        )

    def transport(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The value of a batch of points ``(b, d)``, and the share of each sample, ``(b,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define transport")


class BatchSinkhornLoss(BatchLoss):
    """Entropic transport between the samples of a batch, each a point of mass 1/b.

    OT_ε over the b×b distances between the samples of the student and those of the teacher (SinKD).
    A sample is the point softmax(logits/T), or with ``cost="hidden"`` its features: then the cost
    is |x_i − y_j|² divided by its mean over the batch, a constant for the gradient, so that ε is in
    units of it. With ``reduction="none"`` each sample gets its share of the value, from its
    potentials; the shares add up to b times the mean, and their gradients are that of the mean,
    each.

    Args:
        cost: ``"l1"``, ``"euclidean"`` or ``"sqeuclidean"`` distance between distributions, or
            ``"hidden"``: the loss is then called with ``student_features=`` and
            ``teacher_features=``, ``(*batch, width)``, or with a stored teacher that has features.
        temperature: divides the logits of both. Not with ``cost="hidden"``, which reads no logits;
            nor are ``teacher_temperature``, ``vocab_size`` and ``rescale_t2=True``.
        sample_cost: what it costs, on top, to move mass from one sample to another. At 0, as in
            SinKD, the plan does not know which sample is which, and only the batch as a whole is
            matched; the larger it is, the more each sample is matched to itself, in the end with
            the mean of its own distances.
        epsilon: entropic strength in units of the cost.
        debias: subtract half the transport of each side to itself, so that the value is 0, with no
            gradient, where the two sets of points agree. With False, as in SinKD, it is not.
        value: ``"dual"``, or ``"sharp"`` for ⟨P, C⟩ (gradients by implicit differentiation).
        max_iterations: limit of the solver.
        tolerance: L1 marginal error at which the batch is solved.
        projection: with ``cost="hidden"``, takes the student's features into the teacher's space,
            such as ``nn.Linear(student_width, teacher_width)``; needed where the widths differ, and
            trained with the student, as in FitNets and TinyBERT. (A least-squares map of the batch
            would fit any batch smaller than the width, and leave nothing to learn; distances within
            each model are another problem, Gromov-Wasserstein.)
        **common: see :class:`BatchLoss`.

    Raises:
        TypeError, ValueError: for settings out of range; on call, for missing features, or such of
            different width.

    Source: Cui et al. (2024), "SinKD: Sinkhorn Distance Minimization for Knowledge Distillation".
    """

    def __init__(
        self,
        cost: str = "l1",
        *,
        temperature: float = _TEMPERATURE,
        epsilon: float = 0.1,
        debias: bool = True,
        value: str = "dual",
        max_iterations: int = 1000,
        tolerance: float = 1e-4,
        sample_cost: float = 0.0,
        projection: nn.Module | None = None,
        **common: Unpack[BatchSettings],
    ) -> None:
        super().__init__(temperature=temperature, **common)
        check_choice("cost", cost, (*BATCH_COSTS, "hidden"))
        if projection is not None and not isinstance(projection, nn.Module):
            raise TypeError(
                "projection must be a module such as nn.Linear(student_width, teacher_width), got "
                f"{type(projection).__name__}"
            )
        if projection is not None and cost != "hidden":
            raise ValueError(f'a projection is for cost="hidden", not {cost!r}')
        if cost == "hidden":
            _refuse_settings_of_logits(self)
        self.cost = cost
        self.sample_cost = as_not_negative("sample_cost", sample_cost)
        self.projection = projection
        self.solver_options = Options(
            epsilon=epsilon,
            tolerance=tolerance,
            max_iterations=max_iterations,
            value=value,
            debias=debias,
        )

    @property
    def needs_features(self) -> bool:
        """Whether the samples are their features."""
        return self.cost == "hidden"

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether the logits, which are not compared then, may be of any two sizes."""
        return self.needs_features

    def points(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The counted samples of student and teacher, ``(b, d)``."""
        if self.cost != "hidden":
            return super().points(batch)
        shape = tuple(batch.student_logits.shape[:-1])
        student = _check_features("student_features", batch.student_features, shape)
        teacher = _check_features("teacher_features", batch.teacher_features, shape)
        student, teacher = _counted(batch, student, teacher)
        dtype = compute_dtype(batch.student_logits)
        student, teacher = student.to(dtype), teacher.detach().to(dtype)
        with without_autocast(student):
            if self.projection is not None:
                _check_projection(self.projection, student.shape[-1])
                student = self.projection(student)
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"the student's features have width {student.shape[-1]} and the teacher's "
                f"{teacher.shape[-1]}: give BatchSinkhornLoss a projection, such as "
                f"nn.Linear({student.shape[-1]}, {teacher.shape[-1]})"
            )
        for side, values in (("student", student), ("teacher", teacher)):
            _check_finite_features(f"{side}_features", values.detach())
        return student, teacher

    def transport(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`BatchLoss`."""
        cost, normalize = ("sqeuclidean", True) if self.cost == "hidden" else (self.cost, False)
        solution = transport_between_points(
            student,
            teacher,
            cost,
            self.solver_options,
            normalize=normalize,
            sample_cost=self.sample_cost,
        )
        support = f"the {len(student)} samples of the batch"
        self.last_report = replace(solution.report, support=support)
        source, target = solution.shares()
        return solution.value, source + target

    def extra_repr(self) -> str:
        """The settings of the transport and the common ones."""
        options = self.solver_options
        return f"cost={self.cost!r}, epsilon={options.epsilon}, " + super().extra_repr()


class UnrolledBatchSinkhornLoss(BatchLoss):
    """The batch transport of SinKD's public code, number for number.

    K = exp(−W/ε) with W the L1 distances; ``iterations`` times the rows of P, then its columns,
    are made to sum to 1 (mass b, not 1); the value is ``factor``·⟨P, W⟩, differentiated through
    every iteration. For reproducing results; :class:`BatchSinkhornLoss` is the sound form.

    Args:
        temperature: divides the logits of both.
        epsilon: entropic strength.
        iterations: number of iterations, all of them made.
        factor: multiplies the value.
        **common: see :class:`BatchLoss`.
    """

    def __init__(
        self,
        *,
        temperature: float = _TEMPERATURE,
        epsilon: float = 0.1,
        iterations: int = 20,
        factor: float = 0.001,
        **common: Unpack[BatchSettings],
    ) -> None:
        super().__init__(temperature=temperature, **common)
        self.epsilon = as_positive("epsilon", epsilon)
        self.iterations = as_whole("iterations", iterations)
        self.factor = as_positive("factor", factor)

    def transport(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`BatchLoss`."""
        with without_autocast(student):
            distances = point_distances(student, teacher, "l1")
            plan = (distances / -self.epsilon).exp()
            for _ in range(self.iterations):
                plan = plan / plan.sum(-1, keepdim=True)
                plan = plan / plan.sum(-2, keepdim=True)
            shares = len(student) * self.factor * (plan * distances).sum(-1)
        return shares.mean(), shares


def _refuse_settings_of_logits(loss: DistillationLoss) -> None:
    without_effect = {
        "temperature": loss.temperature != _TEMPERATURE,
        "teacher_temperature": loss.teacher_temperature is not None,
        "vocab_size": loss.vocab_size is not None,
        "rescale_t2": loss.rescale_t2,
    }
    for name, given in without_effect.items():
        if given:
            raise ValueError(
                f'{name}= is about logits, and cost="hidden" compares states: leave it out'
            )


def _counted(batch: Batch, *values: Tensor) -> list[Tensor]:
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


def _check_features(name: str, features: Tensor | None, batch_shape: tuple[int, ...]) -> Tensor:
    check_floating(name, features, "(*batch, width)")
    assert features is not None
    if features.ndim < 1 or tuple(features.shape[:-1]) != batch_shape:
        raise ValueError(
            f"{name} must have shape {batch_shape} + (width,), got {tuple(features.shape)}"
        )
    return features


def _check_projection(projection: nn.Module, width: int) -> None:
    expected = getattr(projection, "in_features", width)
    if expected != width:
        raise ValueError(
            f"the projection takes features of width {expected}, but the student's have {width}"
        )


def _check_finite_features(name: str, features: Tensor) -> None:
    finite = features.isfinite().all(-1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(finite)} counted samples have {name} that are not "
            "finite; positions outside the mask may hold anything"
        )
