"""Optimal transport between the samples of a batch: a loss of the whole batch."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from otkd.checks import check_choice
from otkd.functional.batch_transport import BATCH_COSTS, transport_between_points
from otkd.functional.report import Report
from otkd.losses.base import Batch, DistillationLoss
from otkd.losses.batch_base import SINKD_TEMPERATURE, BatchLoss, BatchSettings, counted_rows
from otkd.losses.registry import register_loss
from otkd.ot.options import Objective, SolverSettings
from otkd.precision import compute_dtype, without_autocast
from otkd.scalars import as_flag, as_not_negative
from otkd.tensors import check_floating


@register_loss("batch_sinkhorn")
class BatchSinkhornLoss(BatchLoss):
    """Entropic optimal transport between the student's and the teacher's samples of a batch.

    Each of the b samples is a point of mass 1/b, and the cost is the distance of two points, as in
    SinKD. The point of a sample is softmax(logits/T). With ``cost="hidden"`` it is the sample's
    feature vector, and the cost is |x_i − y_j|² divided by its mean over the batch (a constant for
    the gradient), so that ε is a fraction of a typical cost.

    With ``reduction="none"`` each sample gets its share of the value, computed from its
    potentials. The shares add up to b times the mean, and each has the gradient of the mean.

    Args:
        cost: ``"l1"``, ``"euclidean"`` or ``"sqeuclidean"`` distance between distributions, or
            ``"hidden"``. The latter requires ``student_features=`` and ``teacher_features=``,
            ``(*batch, width)``, in the call, or a stored teacher with features.
        temperature: divides the logits of both sides. ``cost="hidden"`` reads no logits, so it
            accepts neither this nor ``teacher_temperature``, ``vocab_size`` or
            ``rescale_t2=True``.
        sample_cost: added to the cost of moving mass from one sample to another. With 0, as in
            SinKD, the plan does not know which sample is which, and only the batch as a whole is
            matched. The larger it is, the more each sample is matched with itself; in the limit
            the loss is the mean distance between the two points of each sample.
        epsilon: strength of the entropic regularisation, in units of the cost.
        debias: subtract half the transport of each side to itself, so that the value is 0 with
            zero gradient where the two sets of points are equal. SinKD does not (False).
        value: ``"dual"``, or ``"sharp"`` for ⟨P, C⟩ (gradients by implicit differentiation).
        max_iterations: limit of the solver.
        tolerance: L1 marginal error at which the batch counts as solved.
        projection: with ``cost="hidden"``, a module that maps the student's features to the
            teacher's width, such as ``nn.Linear(student_width, teacher_width)``. It is required if
            the widths differ, and is trained with the student, as in FitNets and TinyBERT.
        **common: see :class:`BatchLoss`.

    Raises:
        TypeError, ValueError: for settings that are out of range; in a call, for missing features
            or features of different width.

    Source: Cui et al. (2024), "SinKD: Sinkhorn Distance Minimization for Knowledge Distillation".

    Example:
        >>> student = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> teacher = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
        >>> otkd.BatchSinkhornLoss()(student, teacher)
        tensor(0.2385)
    """

    def __init__(
        self,
        cost: str = "l1",
        *,
        temperature: float = SINKD_TEMPERATURE,
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
            raise ValueError(f'projection= requires cost="hidden", got cost={cost!r}')
        if cost == "hidden":
            _refuse_settings_of_logits(self)
        self.cost = cost
        self.sample_cost = as_not_negative("sample_cost", sample_cost)
        self.projection = projection
        self.objective = Objective(epsilon=epsilon, value=value, debias=as_flag("debias", debias))
        self.solver = SolverSettings(tolerance=tolerance, max_iterations=max_iterations)

    @property
    def needs_features(self) -> bool:
        """Whether the points of the samples are their features."""
        return self.cost == "hidden"

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether the two sides' logits may differ in size: True if features are compared."""
        return self.needs_features

    def points(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The points of the counted samples of student and teacher, ``(b, d)``."""
        if self.cost != "hidden":
            return super().points(batch)
        shape = tuple(batch.student_logits.shape[:-1])
        student = _check_features("student_features", batch.student_features, shape)
        teacher = _check_features("teacher_features", batch.teacher_features, shape)
        student, teacher = counted_rows(batch, student, teacher)
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
            self.objective,
            self.solver,
            normalize=normalize,
            sample_cost=self.sample_cost,
        )
        support = f"the {len(student)} samples of the batch"
        self.last_report = Report.of([solution.report], support=support)
        source, target = solution.shares()
        return solution.value, source + target

    def extra_repr(self) -> str:
        """The settings of the transport and the common ones."""
        return f"cost={self.cost!r}, epsilon={self.objective.epsilon}, " + super().extra_repr()


def _refuse_settings_of_logits(loss: DistillationLoss) -> None:
    without_effect = {
        "temperature": loss.temperature != SINKD_TEMPERATURE,
        "teacher_temperature": loss.teacher_temperature is not None,
        "vocab_size": loss.vocab_size is not None,
        "rescale_t2": loss.rescale_t2,
    }
    for name, given in without_effect.items():
        if given:
            raise ValueError(
                f'{name}= has no effect with cost="hidden", which compares features instead of '
                "logits: leave it out"
            )


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
            f"the projection expects features of width {expected}, but the student's have width "
            f"{width}"
        )


def _check_finite_features(name: str, features: Tensor) -> None:
    finite = features.isfinite().all(-1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(finite)} counted samples have {name} that are not "
            "finite. Positions that are masked out may hold any value"
        )
