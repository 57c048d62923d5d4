"""A solved batch of transport problems, with values and gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otkd.ot.gradients import dual_value, sharp_value, source_gradient
from otkd.ot.normal_form import Ground, NormalForm
from otkd.ot.options import SolverSettings
from otkd.ot.potentials import Potentials, excess_of
from otkd.ot.problem import Problem
from otkd.ot.solution import warn_not_converged
from otkd.ot.solver import solve_potentials


@dataclass(frozen=True)
class Transport:
    """A solved batch of problems.

    Attributes:
        value: ``(B,)``, differentiable; for balanced problems that of the normal form.
        problem: what was solved; without autograd history.
        form: the normal form in which it was solved.
        potentials: of the normal form, in its precision.
        value_kind: ``"dual"`` or ``"sharp"``.
        differentiable: whether the gradients of the value were found within the tolerance.
    """

    value: Tensor
    problem: Problem
    form: NormalForm
    potentials: Potentials
    value_kind: str
    differentiable: bool = True

    @property
    def converged(self) -> bool:
        """Whether potentials and gradients were found within the tolerance."""
        return self.potentials.converged and self.differentiable

    @property
    def f(self) -> Tensor:
        """The source potentials of the given problems, ``(B, n)``."""
        return (self.potentials.f + self.form.source_shift).to(self.value)

    @property
    def g(self) -> Tensor:
        """The target potentials of the given problems, ``(B, m)``."""
        return (self.potentials.g + self.form.target_shift).to(self.value)

    def transport_cost(self) -> Tensor:
        """⟨P, C⟩ of each given problem, ``(B,)``."""
        normal, form = self.form.problem, self.form
        f, g = self.potentials.f, self.potentials.g
        moved = torch.linalg.vecdot(normal.a, form.ground.kernel.mean_cost(f, g, normal.b))
        least = form.ground.least
        least = least.squeeze(-1) if isinstance(least, Tensor) else least
        if normal.balanced:
            return (moved + least).to(self.value)
        assert isinstance(form.log_mass, Tensor)
        mass = 1 + torch.linalg.vecdot(normal.a, self.potentials.row_excess)
        return ((moved + least * mass) * torch.exp(form.log_mass).squeeze(-1)).to(self.value)

    def source_gradient(self) -> Tensor:
        """The gradient of the dual value in the source masses, ``(B, n)``, without offsets."""
        return source_gradient(self.problem, self.form, self.potentials)

    def plan(self) -> Tensor:
        """P of each problem, ``(B, n, m)``; not differentiable, and not of a lazy cost."""
        return self.form.plan(self.potentials.f, self.potentials.g).to(self.value)

    @property
    def offset(self) -> Tensor | float:
        """The value of the given problem minus that of its normal form, per unit of mass.

        ``(B,)`` if each problem has its own. Relaxed problems have no such difference.
        """
        if not self.form.problem.balanced:
            return 0.0
        least = self.form.ground.least
        return least.squeeze(-1) / 2 if isinstance(least, Tensor) else least / 2

    def shares(self) -> tuple[Tensor, Tensor]:
        """The contributions of the points of both sides to the value, without the offsets."""
        f, g = self.potentials.f, self.potentials.g
        if self.value_kind == "dual":
            return f.to(self.value), g.to(self.value)
        kernel, problem = self.form.ground.kernel, self.form.problem
        row_cost = kernel.mean_cost(f, g, problem.b)
        column_cost = kernel.transposed.mean_cost(g, f, problem.a)
        return (row_cost / 2).to(self.value), (column_cost / 2).to(self.value)


def solve_transport(
    problem: Problem,
    solver: SolverSettings,
    value: str = "dual",
    ground: Ground | None = None,
    start: Tensor | None = None,
    weights: Tensor | None = None,
) -> Transport:
    """Solve a batch of problems, and attach the gradient to its value.

    ``ground`` is that of the cost if it is known, ``start`` a first guess of the target potentials
    of the normal form, and ``weights`` those of the errors, ``(B, n)``, if not the source masses.
    """
    limits = {"tolerance": solver.tolerance, "max_iterations": solver.max_iterations}
    form = NormalForm.of(problem, ground, tolerance=solver.tolerance)
    start = None if start is None else start.to(form.problem.b)
    potentials = solve_potentials(
        form.problem,
        form.ground.kernel,
        start=start,
        plain_steps=solver.plain_steps,
        least_mass=form.least_mass,
        weights=None if weights is None else weights.to(form.problem.a),
        **limits,
    )
    error = potentials.marginal_error.to(problem.a)
    potentials = replace(potentials, marginal_error=error)
    if value == "dual":
        found, differentiable = dual_value(problem, form, potentials), True
    else:
        found, differentiable = sharp_value(problem, form, potentials, **limits)
    transport = Transport(found, problem.detached(), form, potentials, value, differentiable)
    if not transport.converged:
        what = "the gradient" if potentials.converged else "the potentials"
        warn_not_converged(problem.a, problem.b, problem.epsilon, solver, what)
    return transport


def transport_of(
    problem: Problem, g: Tensor, tolerance: float, ground: Ground | None = None
) -> Transport:
    """A batch of problems whose target potentials are known, with its dual value; not iterated.

    The best source potentials follow by one soft minimum, also at points without mass.

    Args:
        problem: the problems.
        g: their target potentials, ``(B, m)``; any finite number at points without mass.
        tolerance: to which they were solved.
        ground: that of the cost, if it is known.
    """
    form = NormalForm.of(problem, ground, tolerance=tolerance)
    f, g, log_rows = _rows_of(form, g)
    potentials = Potentials(f, g, log_rows, torch.zeros_like(problem.a[:, 0]), 0, True)
    value = dual_value(problem, form, potentials)
    return Transport(value, problem.detached(), form, potentials, "dual")


@torch.no_grad()
def target_error(problem: Problem, g: Tensor, tolerance: float) -> Tensor:
    """The L1 error of the target marginal of the plan with target potentials g, ``(B,)``."""
    form = NormalForm.of(problem, tolerance=tolerance)
    f, g, _ = _rows_of(form, g)
    normal, kernel = form.problem, form.ground.kernel
    softmin = kernel.transposed.softmin(g if normal.symmetric else f, normal.log_masses()[0])
    log_columns = (g - softmin) / normal.epsilon
    optimal = normal.target.optimal_log_ratio(g, log_columns)
    return torch.linalg.vecdot(normal.b, (excess_of(log_columns) - excess_of(optimal)).abs())


@torch.no_grad()
def _rows_of(form: NormalForm, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best f for given target potentials, and these in normal form; and ``log_rows``."""
    normal = form.problem
    g = (g - form.target_shift).to(normal.b)
    softmin = form.ground.kernel.softmin(g, normal.log_masses()[1])
    f = normal.source.damping(normal.epsilon) * softmin
    return f, g, (f - softmin) / normal.epsilon
