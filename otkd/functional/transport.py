"""Entropic transport between the two token distributions of each position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from otkd.checks import check_logits, check_mask, check_temperatures
from otkd.compilation import outside_graphs
from otkd.costs import Cost
from otkd.costs.forms import as_cost
from otkd.functional.report import Report
from otkd.ot.options import Objective, SolverSettings, as_penalties, relaxation_of
from otkd.supports import Positions, Support, as_support, choose_support
from otkd.supports.base import Selection
from otkd.teachers import TopKTeacher
from otkd.teachers.beside import evenly_spread_logits, logits_shaped_by


@outside_graphs
def sinkhorn_divergence(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch teacher_vocab"],
    *,
    cost: Cost | Tensor,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
    epsilon: float = 0.1,
    debias: bool | str | None = "sinkhorn",
    value: str = "dual",
    marginal_relaxation: float | tuple[float | None, float | None] | None = None,
    support: str | Support = "auto",
    max_iterations: int = 200,
    tolerance: float = 1e-4,
    unbalanced: float | tuple[float, float] | None = None,
) -> Float[Tensor, "*batch"]:
    """Entropic transport between q and p over the tokens, debiased by default.

    Args:
        student_logits: ``(*batch, vocab)``; q.
        teacher_logits: ``(*batch, vocab)``; p, a constant. For a cost between two vocabularies,
            ``(*batch, teacher_vocab)``.
        cost: a cost object of :mod:`otkd.costs`, or a ``(vocab, vocab)`` tensor.
        temperature: divides the logits of both sides.
        teacher_temperature: if given, divides the teacher's logits instead.
        mask: ``(*batch,)``; where it is zero, the value is 0 and the logits may hold any value.
        epsilon: strength of the entropic regularisation, in units of the cost.
        debias: ``"sinkhorn"`` (or True) for S_ε, ``"teacher"`` for the difference to the tangent of
            OT_ε(·, p) at p; both are 0 at p = q. None (or False) for OT_ε. See
            :func:`otkd.ot.sinkhorn_divergence`.
        value: ``"dual"`` or ``"sharp"`` (⟨P, C⟩); see :func:`otkd.ot.sinkhorn_divergence`.
        marginal_relaxation: ρ, or a pair (ρ_student, ρ_teacher), in units of the cost: the
            marginals of the plan may differ from q and p at the price of ρ·KL. ``math.inf`` or None
            holds a side.
        support: which tokens take part: ``"auto"`` or an object of :mod:`otkd.supports`.
        max_iterations: limit of the solver.
        tolerance: L1 marginal error at which a position counts as solved.
        unbalanced: deprecated name of ``marginal_relaxation``.

    Returns:
        One value per position, in units of the cost.

    Raises:
        TypeError, ValueError: for wrong shapes, parameters out of range, or NaN in a counted
            position.
    """
    transport = TokenTransport(
        cost=as_cost(cost, learnable=True),
        support=as_support(support),
        solver=SolverSettings(tolerance=tolerance, max_iterations=max_iterations),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )
    objective = Objective(
        epsilon=epsilon,
        debias=debias,
        value=value,
        penalties=as_penalties(relaxation_of(marginal_relaxation, unbalanced)),
    )
    return transport.divergence(student_logits, teacher_logits, objective)[0]


@dataclass(frozen=True, kw_only=True)
class TokenTransport:
    """What decides a transport between token distributions, besides the logits and the objective.

    :meth:`divergence` shows the whole path: logits → counted positions → atoms that the support
    selects, with their masses and costs → solver → one value per position.

    Attributes:
        cost: between tokens.
        support: which tokens take part; None chooses one by the size of the vocabularies.
        solver: tolerance and limit of its iterations.
        temperature: divides the logits of both sides.
        teacher_temperature: if given, divides the teacher's logits instead.
        mask: ``(*batch,)``, or None if every position counts.
        backend: what computes the transport.
        stored: a validated top-k teacher. The teacher's logits then only provide its shape. For
            supports that do not read it, it is expanded to dense logits; the tokens that are not
            stored share the tail's mass as in the student.
    """

    cost: Cost
    support: Support | None
    solver: SolverSettings
    temperature: float
    teacher_temperature: float | None = None
    mask: Tensor | None = None
    backend: str = "auto"
    stored: TopKTeacher | None = None

    def divergence(
        self, student_logits: Tensor, teacher_logits: Tensor, objective: Objective
    ) -> tuple[Tensor, Report | None]:
        """:func:`sinkhorn_divergence` and the solver's report (None without a counted position)."""
        positions, support = self.positions(student_logits, teacher_logits, objective)
        values, report = self.solve(positions, support, objective)
        return values.reshape(student_logits.shape[:-1]), report

    def positions(
        self, student_logits: Tensor, teacher_logits: Tensor, objective: Objective
    ) -> tuple[Positions, Support]:
        """The checked positions, and the support to use."""
        cost, stored = self.cost, self.stored
        check_logits(student_logits, teacher_logits, same_vocabulary=False)
        teacher_temperature = check_temperatures(self.temperature, self.teacher_temperature)
        check_mask(self.mask, student_logits.shape[:-1])
        n, m = student_logits.shape[-1], teacher_logits.shape[-1]
        support = self.support
        if support is None:
            support = choose_support(n, m, self.backend, cost if stored is None else None)
        support.check(cost, n, m, objective, self.backend)
        counted = None if self.mask is None else self.mask.reshape(-1).nonzero().squeeze(-1)
        if stored is not None and support.reads_stored:
            stored = stored.flatten()
        elif stored is not None:
            teacher_logits = (
                logits_shaped_by(stored, student_logits, self.temperature)
                if cost.one_vocabulary
                else evenly_spread_logits(stored)
            )
            stored = None
        positions = Positions(
            student_logits.reshape(-1, n),
            teacher_logits.detach().reshape(-1, m),
            counted,
            self.temperature,
            teacher_temperature,
            stored,
        )
        return positions, support

    def solve(
        self, positions: Positions, support: Support, objective: Objective
    ) -> tuple[Tensor, Report | None]:
        """The value of every position, 0 where it does not count, and the solver's report."""
        values, report = positions.student[:0].sum(-1).to(positions.dtype), None
        if len(positions):
            selection = support.select(positions, self.cost, objective, self.backend)
            values, report = solve_selection(selection, objective, self.solver)
        if positions.counted is not None:
            every = values.new_zeros(len(positions.student))
            values = every.index_copy(0, positions.counted, values)
        return values, report


def solve_selection(
    selection: Selection, objective: Objective, solver: SolverSettings
) -> tuple[Tensor, Report]:
    """The value of every position of a selection, solved block by block, and one report."""
    values, reports, places = [], [], []
    for block in selection.blocks:
        value, report = block.solve(objective, solver)
        values.append(value)
        reports.append(report)
        places.append(block.places)
    value = torch.cat(values)
    if places[0] is not None:
        value = value[torch.cat(places).argsort()]
    coverage = selection.coverage
    report = Report.of(
        reports,
        support=selection.support,
        backend=selection.backend,
        coverage=None if coverage is None else coverage.mean(),
        worst_coverage=None if coverage is None else coverage.min(),
    )
    return value, report
