"""Entropic transport between the two token distributions of each position."""

from __future__ import annotations

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
    values, _ = sinkhorn_with_report(
        student_logits,
        teacher_logits,
        cost=as_cost(cost, learnable=True),
        support=as_support(support),
        objective=Objective(
            epsilon=epsilon,
            debias=debias,
            value=value,
            penalties=as_penalties(relaxation_of(marginal_relaxation, unbalanced)),
        ),
        solver=SolverSettings(tolerance=tolerance, max_iterations=max_iterations),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )
    return values


def sinkhorn_with_report(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    cost: Cost,
    support: Support | None,
    objective: Objective,
    solver: SolverSettings,
    temperature: float,
    teacher_temperature: float | None,
    mask: Tensor | None,
    backend: str = "auto",
    stored: TopKTeacher | None = None,
) -> tuple[Tensor, Report | None]:
    """:func:`sinkhorn_divergence` with the solver's report (None without a counted position).

    This function shows the whole path: logits → counted positions → atoms that the support selects,
    with their masses and costs → solver → one value per position.

    For the arguments see :func:`counted_positions_of`.
    """
    positions, support = counted_positions_of(
        student_logits,
        teacher_logits,
        cost=cost,
        support=support,
        objective=objective,
        backend=backend,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
        stored=stored,
    )
    values, report = solve_positions(positions, support, cost, objective, solver, backend)
    return values.reshape(student_logits.shape[:-1]), report


def solve_positions(
    positions: Positions,
    support: Support,
    cost: Cost,
    objective: Objective,
    solver: SolverSettings,
    backend: str,
) -> tuple[Tensor, Report | None]:
    """The value of every position, 0 where it does not count, and the solver's report."""
    values, report = positions.student[:0].sum(-1).to(positions.dtype), None
    if len(positions):
        values, report = solve_selection(
            support.select(positions, cost, objective, backend), objective, solver
        )
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


def counted_positions_of(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    cost: Cost,
    support: Support | None,
    objective: Objective,
    backend: str,
    temperature: float,
    teacher_temperature: float | None,
    mask: Tensor | None,
    stored: TopKTeacher | None = None,
) -> tuple[Positions, Support]:
    """The checked positions of :func:`sinkhorn_divergence`, and the support to use.

    If ``stored`` is given, it is already validated, and ``teacher_logits`` only provide its shape.
    For supports that do not read a stored teacher it is expanded to dense logits; the tokens that
    are not stored share the tail's mass as in the student.
    """
    check_logits(student_logits, teacher_logits, same_vocabulary=False)
    teacher_temperature = check_temperatures(temperature, teacher_temperature)
    batch_shape = student_logits.shape[:-1]
    check_mask(mask, batch_shape)
    n, m = student_logits.shape[-1], teacher_logits.shape[-1]
    if support is None:
        support = choose_support(n, m, backend, cost if stored is None else None)
    support.check(cost, n, m, objective, backend)
    counted = None if mask is None else mask.reshape(-1).nonzero().squeeze(-1)
    if stored is not None and support.reads_stored:
        stored = stored.flatten()
    elif stored is not None:
        teacher_logits = (
            logits_shaped_by(stored, student_logits, temperature)
            if cost.one_vocabulary
            else evenly_spread_logits(stored)
        )
        stored = None
    positions = Positions(
        student_logits.reshape(-1, n),
        teacher_logits.detach().reshape(-1, m),
        counted,
        temperature,
        teacher_temperature,
        stored,
    )
    return positions, support
