"""Weighted sums of losses."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from otkd.checks import check_one_logits
from otkd.compilation import outside_graphs
from otkd.functional.report import Report
from otkd.losses.ground_cost import MissingCost
from otkd.losses.protocol import Loss, as_loss, joined, teacher_for, worst_report
from otkd.losses.registry import get_loss
from otkd.precision import compute_dtype
from otkd.reductions import ItemCounts
from otkd.scalars import as_number
from otkd.teachers import StoredTeacher


class WeightedLoss(nn.Module):
    """Σ weight·loss over named terms, all given the same call.

    ``WeightedLoss({"kl": (0.9, KLLoss(temperature=2)), "ce": (0.1, "ce")})``: a loss may be given
    by its registry name; ``"ce"`` is the hard-label term. Temperatures are those of each term, and
    so are reductions, which have to agree. A term may be a weighted loss itself. What the sum says
    of itself, such as ``needs_labels``, follows from its terms; see
    :class:`~otkd.losses.protocol.Loss`.

    A stored teacher is handed to every term as it is stored: terms that do not read it so expand
    it for themselves.

    Args:
        terms: name → (weight, loss).

    Attributes:
        last_terms: value of each term in the last call, unweighted, as detached tensors: reading
            one is what makes a device wait, so read them only to log.
        last_report: what the solvers of the terms did in the last call: the report of the only term
            that has one, else the worst of all (the most iterations, the largest error, the least
            coverage); None without a solver.
        last_reports: the report of each term that has one, by name; those of a term that is a
            weighted loss itself by ``"name/inner name"``.

    Raises:
        TypeError: if the terms have no names, or one is not a pair of a weight, which is a plain
            number, and a loss.
        ValueError: if there is no term, a weight is not finite, or the terms differ in their
            reduction; on call, if their values differ in shape.
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
        """Whether any term reads a stored teacher as it is stored."""
        return any(loss.reads_stored for loss in self._losses())

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether every term that needs the teacher takes one of another vocabulary."""
        return self.needs_teacher and all(
            loss.bridges_vocabularies for loss in self._losses() if loss.needs_teacher
        )

    @property
    def reductions(self) -> frozenset[str]:
        """Those of all terms."""
        return frozenset().union(*(loss.reductions for loss in self._losses()))

    @property
    def last_report(self) -> Report | None:
        """The report of the only term that has one, else the worst of all."""
        return worst_report(self.last_reports)

    @property
    def last_reports(self) -> dict[str, Report]:
        """The report of each term that has one, by name."""
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
        teacher_logits: Tensor | StoredTeacher | None = None,
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
            value = loss(
                student_logits,
                teacher_for(loss, teacher_logits, student_logits),
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
                f"the terms of a sum must have values of one shape, got {shapes}: give every term "
                "the same reduction"
            )
        return total

    def extra_repr(self) -> str:
        """The weights."""
        return ", ".join(f"{name}={weight}" for name, weight in self.weights.items())


def _as_term(name: str, term: tuple[float, nn.Module | str]) -> tuple[float, nn.Module]:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"a term cannot be called {name!r}: names are text without a dot, and no method of "
            "nn.ModuleDict"
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
                f"loss itself, {{{name!r}: ({weight:g}, loss)}}"
            ) from None
    if not isinstance(loss, nn.Module):
        raise TypeError(f"the loss of term {name!r} must be a module or a registry name")
    return float(weight), loss


def _check_one_reduction(terms: nn.ModuleDict) -> None:
    # What a module without the protocol of losses returns is seen when it is called.
    of_terms = {
        name: "/".join(sorted(loss.reductions))
        for name, loss in terms.items()
        if isinstance(loss, Loss)
    }
    if len(set(of_terms.values())) > 1:
        each = ", ".join(f"{name!r} {reduction!r}" for name, reduction in of_terms.items())
        raise ValueError(
            f"the terms of a sum must have one reduction, got {each}. A term given by its registry "
            "name has 'mean': for another pass the loss, such as CrossEntropyLoss(reduction='sum')"
        )
