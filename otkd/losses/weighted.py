"""Weighted sums of losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from otkd.checks import check_one_logits
from otkd.compilation import outside_graphs
from otkd.functional.report import Report
from otkd.losses.at_positions import TeacherAtPositions, at_places
from otkd.losses.ground_cost import MissingCost
from otkd.losses.protocol import Loss, as_loss, joined, teacher_for, worst_report
from otkd.losses.registry import get_loss
from otkd.precision import compute_dtype
from otkd.reductions import ItemCounts
from otkd.scalars import as_number
from otkd.teachers import StoredTeacher


class WeightedLoss(nn.Module):
    """Weighted sum of named losses, all called with the same arguments.

    A loss may be given by its registry name; ``"ce"`` is the hard-label term. Every term has its
    own temperature. All terms must have the same reduction. A term may itself be a
    ``WeightedLoss``. Properties such as ``needs_labels`` follow from the terms; see
    :class:`~otkd.losses.protocol.Loss`.

    A stored teacher is passed to every term unchanged. Terms that need all tokens expand it.

    Args:
        terms: name → (weight, loss).

    Attributes:
        last_terms: unweighted value of each term in the last call, as detached tensors. Reading a
            number from one makes the CPU wait for the device, so read them only when logging.
        last_report: what the solvers did in the last call: the report of the only term with a
            solver, or the worst of several (most iterations, largest error, least coverage). None
            without a solver.
        last_reports: the report of each term with a solver, by name; ``"name/inner name"`` for a
            term inside a weighted loss.

    Raises:
        TypeError: if ``terms`` is not a mapping, or a term is not a pair of a number and a loss.
        ValueError: if there is no term, a weight is not finite, or reductions differ; in a call,
            if the values differ in shape.

    Example:
        >>> loss = otkd.WeightedLoss({"kl": (0.9, otkd.KLLoss(temperature=2)), "ce": (0.1, "ce")})
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> loss(student, teacher, labels=torch.tensor([0]))
        tensor(0.1427)
        >>> loss.last_terms
        {'kl': tensor(0.1237), 'ce': tensor(0.3133)}
    """

    def __init__(self, terms: Mapping[str, tuple[float, nn.Module | str]]) -> None:
        super().__init__()
        if not isinstance(terms, Mapping):
            raise TypeError(
                f"WeightedLoss needs terms {{name: (weight, loss)}}, got {type(terms).__name__}"
            )
        if not terms:
            raise ValueError("WeightedLoss needs at least one term {name: (weight, loss)}")
        self.terms = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        for name, term in terms.items():
            self.weights[name], self.terms[name] = _as_term(name, term)
        _check_one_reduction(self.terms)
        self.last_terms: dict[str, Tensor] = {}

    @property
    def needs_teacher(self) -> bool:
        """Whether any term needs teacher logits."""
        return any(loss.needs_teacher for loss in self._losses())

    @property
    def needs_labels(self) -> bool:
        """Whether any term needs labels."""
        return any(loss.needs_labels for loss in self._losses())

    @property
    def needs_features(self) -> bool:
        """Whether any term needs features."""
        return any(loss.needs_features for loss in self._losses())

    @property
    def reads_stored(self) -> bool:
        """Whether any term reads a stored teacher without expanding it."""
        return any(loss.reads_stored for loss in self._losses())

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether every term that needs the teacher accepts another vocabulary."""
        return self.needs_teacher and all(
            loss.bridges_vocabularies for loss in self._losses() if loss.needs_teacher
        )

    @property
    def reductions(self) -> frozenset[str]:
        """The reductions of all terms."""
        return frozenset().union(*(loss.reductions for loss in self._losses()))

    @property
    def last_report(self) -> Report | None:
        """The report of the only term with a solver, or the worst of several."""
        return worst_report(self.last_reports)

    @property
    def last_reports(self) -> dict[str, Report]:
        """The report of each term with a solver, by name."""
        return {
            joined(name, path): report
            for name, loss in self.terms.items()
            for path, report in as_loss(loss).last_reports.items()
        }

    def _losses(self) -> list[Loss]:
        return [as_loss(loss) for loss in self.terms.values()]

    @outside_graphs
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | StoredTeacher | TeacherAtPositions | None = None,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | ItemCounts | None = None,
        student_features: Tensor | None = None,
        teacher_features: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum; arguments as :meth:`otkd.losses.base.DistillationLoss.forward`."""
        check_one_logits("student_logits", student_logits)
        total = student_logits.new_zeros((), dtype=compute_dtype(student_logits))
        values = {}
        for name, loss in self.terms.items():
            value = call_loss(
                loss,
                student_logits,
                teacher_logits,
                labels=labels,
                mask=mask,
                num_items_in_batch=num_items_in_batch,
                student_features=student_features,
                teacher_features=teacher_features,
            )
            values[name] = value.detach()
            total = total + self.weights[name] * value
        self.last_terms = values
        if len({value.shape for value in values.values()}) > 1:
            shapes = ", ".join(f"{name!r} {tuple(value.shape)}" for name, value in values.items())
            raise ValueError(
                f"all terms must return values of the same shape, got {shapes}: give every term "
                "the same reduction"
            )
        return total

    def extra_repr(self) -> str:
        """The weights."""
        return ", ".join(f"{name}={weight}" for name, weight in self.weights.items())


def call_loss(
    loss: nn.Module,
    student_logits: Tensor,
    teacher: Tensor | StoredTeacher | TeacherAtPositions | None,
    *,
    labels: Tensor | None,
    mask: Tensor | None,
    num_items_in_batch: int | float | Tensor | ItemCounts | None,
    **features: Tensor | None,
) -> Tensor:
    """Call a loss with the teacher in the form that it reads, at the positions where there is one.

    For the arguments see :meth:`WeightedLoss.forward`.
    """
    given: Any = teacher
    if isinstance(teacher, TeacherAtPositions) and not isinstance(loss, WeightedLoss):
        given = None
        if as_loss(loss).needs_teacher:
            student_logits = at_places(student_logits, teacher.places)
            labels = None if labels is None else at_places(labels, teacher.places)
            given, mask, num_items_in_batch = teacher.teacher, teacher.counted, teacher.items
    if not isinstance(given, TeacherAtPositions):
        given = teacher_for(loss, given, student_logits)
    return loss(
        student_logits,
        given,
        labels=labels,
        mask=mask,
        num_items_in_batch=num_items_in_batch,
        **features,
    )


def _as_term(name: str, term: tuple[float, nn.Module | str]) -> tuple[float, nn.Module]:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"invalid name {name!r} of a term: names are text without a dot, and not the name of a "
            "method of nn.ModuleDict"
        )
    if not (isinstance(term, tuple) and len(term) == 2):
        raise TypeError(f"term {name!r} must be a pair (weight, loss), got {term!r}")
    weight, loss = as_number(f"the weight of term {name!r}", term[0]), term[1]
    if not math.isfinite(weight):
        raise ValueError(f"the weight of term {name!r} must be finite, got {weight!r}")
    if isinstance(loss, str):
        try:
            loss = get_loss(loss)
        except MissingCost as error:
            raise ValueError(
                f"term {name!r} needs more than the name {loss!r}. {error.advice}; then pass the "
                f"loss itself: {{{name!r}: ({weight:g}, loss)}}"
            ) from None
    if not isinstance(loss, nn.Module):
        raise TypeError(f"the loss of term {name!r} must be a module or a registry name")
    return float(weight), loss


def _check_one_reduction(terms: nn.ModuleDict) -> None:
    # The values of a module without the protocol are checked when it is called.
    of_terms = {
        name: "/".join(sorted(loss.reductions))
        for name, loss in terms.items()
        if isinstance(loss, Loss)
    }
    if len(set(of_terms.values())) > 1:
        each = ", ".join(f"{name!r} {reduction!r}" for name, reduction in of_terms.items())
        raise ValueError(
            f"all terms must have the same reduction, got {each}. A term given by its registry "
            "name has 'mean'; for another reduction pass the loss, such as "
            "CrossEntropyLoss(reduction='sum')"
        )
