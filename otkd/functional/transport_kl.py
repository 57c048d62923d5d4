"""KL that may use mass on near tokens in place of the exact one, at a price."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float, Shaped
from torch import Tensor

from otkd.checks import check_choice
from otkd.compilation import outside_graphs
from otkd.costs import Cost, DiscreteCost, EmbeddingCost
from otkd.costs.forms import as_cost
from otkd.functional.report import Report
from otkd.functional.smoothing import smoothed_kl
from otkd.functional.transport import TokenTransport
from otkd.ot.divergence import SolverReport
from otkd.ot.options import Objective, SolverSettings
from otkd.scalars import as_positive, settle
from otkd.supports import Support, TopK, as_support

DIRECTIONS = ("forward", "reverse")
DEBIASINGS = ("auto", "teacher")
LARGEST_PRICE = 1e9
"""Far above any at which a token is forgiven; much higher ones would overflow."""
_HEAD = 32  # tokens of each side; the others have no tail, so that fewer are enough


@dataclass(frozen=True, kw_only=True)
class Price:
    """The settings of a transport KL that a user chooses, and the problem that they stand for.

    Attributes:
        price: κ, in nats per unit of the cost.
        smoothing: η, from above 0 to 1.
        direction: ``"forward"`` or ``"reverse"``.
    """

    price: float
    smoothing: float
    direction: str

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, DIRECTIONS)
        settle(
            self,
            price=as_positive("price", self.price),
            smoothing=as_positive("smoothing", self.smoothing),
        )
        if self.price > LARGEST_PRICE:
            raise ValueError(
                f"price must be at most {LARGEST_PRICE:.0e}, got {self.price!r}: use KLLoss or "
                "ReverseKLLoss, which are its limits"
            )
        if self.smoothing > 1:
            raise ValueError(f"smoothing must be at most 1, got {self.smoothing!r}")
        if self.smoothing == 1 and self.direction == "reverse":
            raise ValueError(
                "direction='reverse' requires smoothing below 1: at 1 the value is linear in the "
                "student's distribution, and its distance to the tangent is 0 everywhere"
            )

    @property
    def epsilon(self) -> float:
        """ε = η/κ."""
        return self.smoothing / self.price

    @property
    def relaxation(self) -> float:
        """ρ = (1 − η)/κ."""
        return (1 - self.smoothing) / self.price

    @property
    def unit(self) -> float:
        """By what the value of the transport problem is divided, so that the result is in nats."""
        return 1 / self.price if self.direction == "forward" else self.relaxation

    def objective(self, debias: str | None) -> Objective:
        """The transport problem."""
        penalties = self.relaxation, math.inf
        if self.direction == "reverse":
            penalties = math.inf, self.relaxation
        return Objective(epsilon=self.epsilon, debias=debias, penalties=penalties)


def debiasing_for(cost: Cost, debias: str | None) -> str | None:
    """How to debias with this cost: ``"auto"`` debiases over one vocabulary, where it exists.

    Raises:
        ValueError: if ``debias`` is neither ``"auto"`` nor ``"teacher"`` nor None.
    """
    if debias is None:
        return None
    check_choice("debias", debias, DEBIASINGS)
    return "teacher" if debias == "teacher" or cost.one_vocabulary else None


@outside_graphs
def transport_kl_divergence(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch teacher_vocab"],
    *,
    cost: Cost | Tensor,
    price: float = 30.0,
    smoothing: float = 1.0,
    direction: str = "forward",
    debias: str | None = "auto",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
    support: str | Support = "auto",
    max_iterations: int = 200,
    tolerance: float = 1e-4,
) -> Float[Tensor, "*batch"]:
    """KL between the teacher and the student after mass has moved between near tokens, in nats.

    See :class:`otkd.TransportKLLoss` for the formula. It tends to KL(p‖q) (``"forward"``) or
    KL(q‖p) (``"reverse"``) as the price grows.

    Args:
        student_logits: ``(*batch, vocab)``; q.
        teacher_logits: ``(*batch, vocab)``; p, a constant. For a cost between two vocabularies,
            ``(*batch, teacher_vocab)``.
        cost: a cost object of :mod:`otkd.costs`, or a ``(vocab, vocab)`` tensor; a constant.
        price: κ, in nats per unit of the cost.
        smoothing: η, above 0 and at most 1.
        direction: ``"forward"`` or ``"reverse"``.
        debias: ``"auto"``, ``"teacher"`` or None.
        temperature: divides the logits of both sides.
        teacher_temperature: if given, divides the teacher's logits instead.
        mask: ``(*batch,)``; where it is zero, the value is 0 and the logits may hold any value.
        support: which tokens take part: ``"auto"`` or an object of :mod:`otkd.supports`.
        max_iterations: limit of the solver.
        tolerance: L1 marginal error at which a position counts as solved.

    Returns:
        One value per position, in nats.

    Raises:
        TypeError, ValueError: for wrong shapes, parameters out of range, or NaN in a counted
            position.
    """
    cost = as_cost(cost)
    transport = TokenTransport(
        cost=cost,
        support=as_support(support),
        solver=SolverSettings(tolerance=tolerance, max_iterations=max_iterations),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )
    settings = Price(price=price, smoothing=smoothing, direction=direction)
    objective = settings.objective(debiasing_for(cost, debias))
    return transport_kl_of(transport, student_logits, teacher_logits, settings, objective)[0]


def transport_kl_of(
    transport: TokenTransport,
    student_logits: Tensor,
    teacher_logits: Tensor,
    settings: Price,
    objective: Objective,
) -> tuple[Tensor, Report | None]:
    """:func:`transport_kl_divergence` and the solver's report (None without a counted position).

    With ``smoothing=1``, one vocabulary and :class:`~otkd.supports.TopK`, the closed form of
    :mod:`otkd.functional.smoothing` makes every token of the tail an atom of its own.
    """
    cost = transport.cost
    positions, chosen = transport.positions(student_logits, teacher_logits, objective)
    batch_shape = student_logits.shape[:-1]
    closed = settings.smoothing == 1 and positions.stored is None and _is_smoothing(cost, objective)
    if not (closed and isinstance(chosen, TopK) and chosen.tail):
        values, report = transport.solve(positions, chosen, objective)
        return values.reshape(batch_shape) / settings.unit, report
    chosen = TopK(_HEAD) if transport.support is None else chosen
    values = smoothed_kl(
        positions,
        None if transport.mask is None else transport.mask.reshape(-1),
        cost=cost,
        epsilon=settings.epsilon,
        debiased=objective.debias is not None,
        k=chosen.k,
        clusters=chosen.clusters,
    )
    error = values.new_zeros(())
    solved = SolverReport(iterations=1, marginal_error=error, converged=True)
    report = Report.of([solved], support=repr(chosen)) if len(positions) else None
    return values.reshape(batch_shape), report


def _is_smoothing(cost: Cost, objective: Objective) -> bool:
    """Whether the cost is constant and symmetric, as the teacher's debiasing requires already."""
    known = isinstance(cost, DiscreteCost | EmbeddingCost) and not cost.learns
    return objective.debias is not None or (known and cost.one_vocabulary)
