"""The TopK support with a stored teacher: masses of the atoms, and the stored self-term."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkd.costs import Cost
from otkd.ot.divergence import own_problem
from otkd.ot.options import Objective, SolverSettings
from otkd.ot.problem import Problem
from otkd.ot.solution import ConvergenceWarning
from otkd.ot.transport import solve_transport, target_error
from otkd.precision import without_autocast
from otkd.supports.heads import Heads
from otkd.teachers.self_term import SelfTermSettings
from otkd.teachers.topk import TopKTeacher

if TYPE_CHECKING:
    from otkd.supports.topk import TopK

_COMPARED_TOKENS = 6
_BLOCK_ELEMENTS = 2**22
_CHECKED_POSITIONS = 2
_CHECKED_ELEMENTS = 2**14
_LARGEST_ERROR = 0.05
"""L1 marginal error of a self-term that was not solved to the end, and may yet be right."""


def stored_masses(stored: TopKTeacher, heads: Heads, dtype: torch.dtype) -> Tensor:
    """The masses of N stored positions on atoms that include their tokens, ``(N, K + 1)``.

    Atoms that are not stored have mass 0, and the last has the remaining mass. A constant.
    """
    return _on_atoms(stored.masses(dtype), stored, heads)


def _on_atoms(values: Tensor, stored: TopKTeacher, heads: Heads) -> Tensor:
    """Values of the stored tokens and the tail at their atoms, ``(N, K + 1)``; 0 at the others."""
    order = heads.tokens.masked_fill(~heads.valid, stored.vocab_size).sort(-1)
    slots = stored.slots
    places = order.indices.gather(-1, torch.searchsorted(order.values, slots.tokens))
    # An empty slot repeats the token and the value of another slot.
    filled = values[:, :-1].gather(-1, slots.source)
    head = torch.zeros_like(heads.tokens, dtype=values.dtype).scatter_(-1, places, filled)
    return torch.cat([head, values[:, -1:]], -1)


def stored_potential(
    stored: TopKTeacher,
    heads: Heads,
    cost: Cost,
    support: TopK,
    objective: Objective,
    dtype: torch.dtype,
) -> Tensor | None:
    """The stored target potentials of U(p, p) at N positions, on their atoms, ``(N, K + 1)``.

    Atoms that are not stored have mass 0, so their potential is not used. None if the potentials
    are not needed, not stored, or stored for another problem.
    """
    if stored.self_potential is None or stored.self_settings is None or objective.debias is None:
        return None
    reason = _obstacle(cost, support, objective)
    if reason is None:
        settings = _settings(stored, cost, support, objective, dtype)
        if not stored.self_settings.fits(settings):
            reason = (
                "it was stored for another cost, epsilon, marginal_relaxation or debias (of "
                "TransportKLLoss: price, smoothing or direction)"
            )
        elif not _solves_its_problem(stored, cost, support, objective, dtype):
            reason = (
                "it does not belong to these masses; compute it again with "
                "loss.with_self_term(teacher)"
            )
        else:
            return _on_atoms(stored.self_potential.to(dtype), stored, heads)
    warnings.warn(
        f"the stored self-term is not used, and is solved in every step instead: {reason}",
        stacklevel=2,
    )
    return None


@torch.no_grad()
def _solves_its_problem(
    stored: TopKTeacher, cost: Cost, support: TopK, objective: Objective, dtype: torch.dtype
) -> bool:
    """Whether the potentials solve U(p, p): all are finite, and a sample has the marginals."""
    assert stored.self_potential is not None
    count = min(len(stored), max(_CHECKED_POSITIONS, _CHECKED_ELEMENTS // (stored.k + 1) ** 2))
    rows = torch.linspace(0, len(stored) - 1, count, device=stored.tokens.device).round().long()
    few, potential = stored[rows], stored.self_potential.to(dtype)
    problem = _own_problem(few, cost, support, objective, dtype)
    error = target_error(problem, potential[rows], _LARGEST_ERROR).max()
    return bool(potential.isfinite().all() & (error <= _LARGEST_ERROR))


@torch.no_grad()
def solve_self_term(
    teacher: TopKTeacher,
    cost: Cost,
    support: TopK,
    objective: Objective,
    solver: SolverSettings,
) -> tuple[Tensor, SelfTermSettings]:
    """The target potential of U(p, p) at every stored position, ``(*batch, k + 1)``.

    It is NaN at positions without a teacher.

    Raises:
        ValueError: if there is no self-term that can be stored.
    """
    reason = _obstacle(cost, support, objective) if objective.debias else "debias=None"
    if reason is not None:
        raise ValueError(f"the self-term cannot be stored: {reason}")
    flat = teacher.flatten()
    dtype = torch.float64 if teacher.log_masses.dtype == torch.float64 else torch.float32
    potential = flat.log_masses.new_full((len(flat), flat.k + 1), torch.nan, dtype=dtype)
    there = (~flat.log_masses.isnan().any(-1)).nonzero().squeeze(-1)
    for rows in there.split(max(1, _BLOCK_ELEMENTS // (flat.k + 1) ** 2)):
        problem = _own_problem(flat[rows].validate(), cost, support, objective, dtype)
        with without_autocast(problem.a):
            potential[rows] = _solved_potential(problem, objective, solver).to(dtype)
    settings = _settings(teacher, cost, support, objective, dtype)
    return potential.reshape(*teacher.tokens.shape[:-1], -1), settings


def _solved_potential(problem: Problem, objective: Objective, solver: SolverSettings) -> Tensor:
    solved = solve_transport(problem, solver)
    if objective.debias == "sinkhorn":
        # Include what has not converged, so that 2·⟨b, g⟩ is the dual value that a step computes.
        return solved.g - objective.epsilon / 2 * solved.potentials.row_excess
    # The tangent is evaluated at students that may have mass on any atom, so that all atoms count
    # alike. At masses near the smallest number this may not converge, and hardly matters.
    everywhere = torch.ones_like(problem.a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        finer = solve_transport(problem, solver, start=solved.potentials.g, weights=everywhere)
    better = finer.potentials.marginal_error <= solver.tolerance
    return torch.where(better.unsqueeze(-1), finer.g, solved.g)


def _obstacle(cost: Cost, support: TopK, objective: Objective) -> str | None:
    """The reason why the self-term cannot be stored; None if it can."""
    obstacles = {
        "the cost is learnable": cost.learns,
        "the support has no tail": not support.tail,
        f"clusters={support.clusters}, but the tail is stored as a single mass": support.clusters
        > 1,
        f"value={objective.value!r}, but only the dual value can be stored": objective.value
        != "dual",
        "marginal_relaxation is set, which requires debias='teacher'": not objective.balanced
        and objective.debias == "sinkhorn",
        "debias='teacher' requires one vocabulary": not cost.one_vocabulary
        and objective.debias == "teacher",
    }
    return next((reason for reason, present in obstacles.items() if present), None)


def _own_problem(
    stored: TopKTeacher, cost: Cost, support: TopK, objective: Objective, dtype: torch.dtype
) -> Problem:
    b = stored.masses(dtype)
    return own_problem(b, b.log(), _matrix(stored, cost, support, objective, dtype), objective)


def _matrix(
    stored: TopKTeacher, cost: Cost, support: TopK, objective: Objective, dtype: torch.dtype
) -> Tensor:
    tokens, size = stored.slots.tokens, stored.vocab_size
    # Within one vocabulary all sides are the same, so use the one that steps use.
    sides = "source" if cost.one_vocabulary else "target", "target"
    return support._matrix(cost, tokens, tokens, sides, (size, size), objective, dtype)


def _settings(
    stored: TopKTeacher, cost: Cost, support: TopK, objective: Objective, dtype: torch.dtype
) -> SelfTermSettings:
    """ε, and the costs between a few tokens, spread over the vocabulary, and the tail."""
    key = ("settings", stored.vocab_size, objective.epsilon, stored.tokens.device)
    if key not in cost.tail_constants:
        size = stored.vocab_size
        chosen = torch.linspace(0, size - 1, min(size, _COMPARED_TOKENS)).round().long()
        few = TopKTeacher(chosen.unsqueeze(0), torch.zeros(1, len(chosen)), size)
        few = few.to(stored.tokens.device)
        with torch.no_grad():
            matrix = _matrix(few, cost, support, objective, dtype)[0]
        upper = torch.ones_like(matrix, dtype=torch.bool).triu_()
        cost.tail_constants[key] = matrix[upper].cpu()
    assert isinstance(objective.debias, str)
    costs = tuple(cost.tail_constants[key].tolist())
    return SelfTermSettings(objective.epsilon, costs, objective.debias, objective.penalties)
