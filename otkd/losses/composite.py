"""Losses made of losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from otkd.checks import check_one_logits
from otkd.compilation import outside_graphs
from otkd.losses.base import Batch, DistillationLoss, as_pair
from otkd.losses.batch import BatchSinkhornLoss, UnrolledBatchSinkhornLoss
from otkd.losses.divergences import CrossEntropyLoss, KLLoss
from otkd.losses.protocol import Loss, as_loss, joined, teacher_for, worst_report
from otkd.losses.transport import MissingCost
from otkd.ot.divergence import Report
from otkd.precision import compute_dtype
from otkd.reductions import ItemCounts
from otkd.scalars import as_number
from otkd.signals import TeacherSignal


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
        teacher_logits: Tensor | TeacherSignal | None = None,
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
    from otkd.losses.registry import get_loss

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


class SoftCrossEntropyLoss(KLLoss):
    """−Σ p·log q: KL(p‖q) plus the entropy of the teacher; the same gradient.

    Arguments as :class:`~otkd.losses.base.DistillationLoss`.
    """

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        return super().per_position(batch) + self._teacher_entropy(batch)

    def _teacher_entropy(self, batch: Batch) -> Tensor:
        if batch.stored is not None:
            log_p = batch.stored.log_atoms().to(compute_dtype(batch.student_logits))
            if batch.counted is not None:
                log_p = log_p.masked_fill(~batch.counted.unsqueeze(-1), 0.0)
        else:
            logits = batch.teacher_logits
            if batch.counted is not None:
                logits = logits.masked_fill(~batch.counted.unsqueeze(-1), 0.0)
            scaled = logits.to(compute_dtype(batch.student_logits)) / (
                self.teacher_temperature or self.temperature
            )
            log_p = scaled.log_softmax(-1)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
        return entropy if batch.counted is None else entropy * batch.counted


class SinKDLoss(WeightedLoss):
    """α·KL + (1−α)·CE + weight·batch Sinkhorn: the objective of SinKD, on a sound footing.

    Its transport is debiased, so that it is 0 where student and teacher agree, and its weight is
    0.1. The published weight, 0.8, is for the public code, whose transport is smaller: at 32
    samples of three classes the gradient of ``BatchSinkhornLoss(debias=False)`` was 27 times that
    of :meth:`author`'s.

    Args:
        alpha: weight of the KL term; 1 − α is that of the hard labels.
        sinkhorn_weight: weight of the batch transport.
        temperature: of the KL term, 1 by default. Not beside ``soft_loss``, which has its own.
        teacher_temperature: of the KL term; likewise.
        rescale_t2: multiply the KL term by the square of its temperature; likewise.
        reduction: of every term; ``soft_loss`` and ``transport`` must have the same.
        vocab_size: number of real classes where the logits are padded; of every term that compares
            logits, ``soft_loss`` and ``transport`` among them.
        soft_loss: in the place of the KL term.
        transport: in the place of ``BatchSinkhornLoss()``.

    Raises:
        TypeError: for settings that are no numbers.
        ValueError: unless 0 ≤ ``alpha`` ≤ 1, for settings out of range, and for a loss beside
            settings that contradict it.

    Source: Cui et al. (2024), "SinKD: Sinkhorn Distance Minimization for Knowledge Distillation".
    """

    def __init__(
        self,
        alpha: float = 0.9,
        sinkhorn_weight: float = 0.1,
        *,
        temperature: float | None = None,
        teacher_temperature: float | None = None,
        rescale_t2: bool | None = None,
        reduction: str = "mean",
        vocab_size: int | None = None,
        soft_loss: nn.Module | None = None,
        transport: nn.Module | None = None,
    ) -> None:
        alpha = as_number("alpha", alpha)
        sinkhorn_weight = as_number("sinkhorn_weight", sinkhorn_weight)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
        common: dict[str, Any] = {"reduction": reduction, "vocab_size": vocab_size}
        of_the_kl_term = {
            "temperature": temperature,
            "teacher_temperature": teacher_temperature,
            "rescale_t2": rescale_t2,
        }
        given = {name: value for name, value in of_the_kl_term.items() if value is not None}
        if soft_loss is None:
            soft_loss = KLLoss(**given, **common)
        elif given:
            raise ValueError(
                f"{next(iter(given))}= is a setting of the KL term, which soft_loss= replaces: "
                f"give it to the {type(soft_loss).__name__}"
            )
        if transport is None:
            transport = BatchSinkhornLoss(**common)
        for name, loss in (("soft_loss", soft_loss), ("transport", transport)):
            _check_vocab_size(name, loss, vocab_size)
        super().__init__(
            {
                "kl": (alpha, soft_loss),
                "ce": (1 - alpha, CrossEntropyLoss(**common)),
                "sinkhorn": (sinkhorn_weight, transport),
            }
        )

    @classmethod
    def author(
        cls,
        alpha: float = 0.9,
        sinkhorn_weight: float = 0.8,
        *,
        temperature: float = 1.0,
        reduction: str = "mean",
    ) -> SinKDLoss:
        """The arithmetic of the public code exactly, for reproducing its results.

        Soft cross-entropy without T² in the place of KL; transport of mass b, times 0.001, through
        20 unrolled iterations at ε = 0.1 and temperature 2.
        """
        return cls(
            alpha,
            sinkhorn_weight,
            reduction=reduction,
            soft_loss=SoftCrossEntropyLoss(
                temperature=temperature, rescale_t2=False, reduction=reduction
            ),
            transport=UnrolledBatchSinkhornLoss(reduction=reduction),
        )


def _check_vocab_size(name: str, loss: nn.Module, vocab_size: int | None) -> None:
    """Raise ``ValueError`` if a term reads other logits of the student than the hard labels do."""
    if not isinstance(loss, DistillationLoss) or loss.needs_features:
        return
    own = loss.vocab_size
    sizes = [None if size is None else as_pair(size)[0] for size in (own, vocab_size)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name} has vocab_size={own} and SinKDLoss vocab_size={vocab_size}: give both the same"
        )
