"""Gradients of transport by the envelope theorem or implicit differentiation.

At the optimum, the derivative of the dual value is that of the Lagrangian with fixed potentials:
∂OT/∂a = f, ∂OT/∂b = g, ∂OT/∂C = P. No iteration is recorded or repeated.

The sharp value V = ⟨P, C⟩ has no such theorem. Differentiating the optimality conditions

    Σ_j b_j·E_ij = 1,   Σ_i a_i·E_ij = 1,   E = exp((f + g − C)/ε)

and eliminating df, dg with the adjoint (x, y) that solves

    x_i = Σ_j b_j·E_ij·(C_ij − y_j),   y_j = Σ_i a_i·E_ij·(C_ij − x_i)

gives ∂V/∂a = x, ∂V/∂b = y and ∂V/∂C = P∘(1 + (x⊕y − C)/ε). This system is the linearised Sinkhorn
iteration, and is solved by the same alternation, at the same rate and in the same memory. If the
solver stopped early, the sums of b_j·E_ij are not 1, and appear as factors of x_i and y_j in the
linearised conditions. The updates are divided by them, so that the alternation computes averages
and cannot diverge. It is accelerated like the solver's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from otkd.checks import refuse_second_derivative
from otkd.ot.acceleration import Anderson
from otkd.ot.kernels.base import Kernel
from otkd.ot.normal_form import NormalForm
from otkd.ot.potentials import Potentials, excess_of
from otkd.ot.problem import Marginal, Problem
from otkd.precision import without_autocast

PullBack = Callable[[Tensor, Sequence[bool]], tuple[Tensor | None, ...]]
"""From the gradient of the value to those of what the cost is made of, those that are needed."""

_ROUNDING = 4.0  # times the rounding error of the largest cost


class _WithGradient(torch.autograd.Function):
    """A value that was computed without autograd, with its gradients."""

    @staticmethod
    def forward(ctx, value, grad_a, grad_b, pull_back, a, b, *cost_inputs):
        ctx.save_for_backward(grad_a, grad_b)
        # If no gradient is needed, release the kernel.
        ctx.pull_back = pull_back if any(ctx.needs_input_grad[6:]) else None
        return value.clone()

    @staticmethod
    def backward(ctx, grad_value):  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("transport is")
        grad_a, grad_b = ctx.saved_tensors
        weights = grad_value.unsqueeze(-1)
        needs_a, needs_b, *needed = ctx.needs_input_grad[4:]
        grad_inputs: tuple[Tensor | None, ...] = (None,) * len(needed)
        if ctx.pull_back is not None:
            with without_autocast(weights):
                grad_inputs = tuple(
                    None if part is None else part.to(weights)
                    for part in ctx.pull_back(weights, needed)
                )
        return (
            *(None,) * 4,
            weights * grad_a if needs_a else None,
            weights * grad_b if needs_b else None,
            *grad_inputs,
        )


def dual_value(problem: Problem, form: NormalForm, potentials: Potentials) -> Tensor:
    """OT_ε of every problem, ``(B,)``, with its envelope gradients in a, b and the cost.

    For balanced problems it is the value of the normal form. If a side has log masses, its gradient
    is the one in these.
    """
    normal, kernel = form.problem, form.ground.kernel
    f, g = potentials.f, potentials.g
    if problem.balanced:
        source = f if normal.log_a is None else normal.a * f
        target = g if normal.log_b is None else normal.b * g
        value = torch.linalg.vecdot(normal.a, f) + torch.linalg.vecdot(normal.b, g)
        if problem.symmetric:
            value = value - normal.epsilon * torch.linalg.vecdot(normal.a, potentials.row_excess)
    else:
        value, source, target = _relaxed(problem.detached(), form, potentials)

    def pull_back(weights, needed):
        left, right, source, target = weights * normal.a, normal.b, f, g
        if isinstance(form.log_mass, Tensor):
            # Half on either side, so that neither potential exceeds the range of the dtype.
            factor = (form.log_mass / 2).exp()
            middle = (f.amax(-1, keepdim=True) - g.amax(-1, keepdim=True)) / 2
            left, right, source, target = left * factor, right * factor, f - middle, g + middle
        return kernel.pull_back(source, target, left, right, needed)

    return _attached(problem, value, source, target, pull_back)


def source_gradient(problem: Problem, form: NormalForm, potentials: Potentials) -> Tensor:
    """The envelope gradient of :func:`dual_value` in the masses a, ``(B, n)``; a constant."""
    if problem.balanced:
        return potentials.f.to(problem.a.dtype)
    without_logs = replace(problem.detached(), log_a=None, log_b=None)
    return _relaxed(without_logs, form, potentials)[1].to(problem.a.dtype)


def _attached(
    problem: Problem, value: Tensor, source: Tensor, target: Tensor, pull_back: PullBack
) -> Tensor:
    """The value with its gradients, in the precision of the problem."""
    found = (x.to(problem.a.dtype) for x in (value, source, target))
    a = problem.a if problem.log_a is None else problem.log_a
    b = problem.b if problem.log_b is None else problem.log_b
    return _WithGradient.apply(*found, pull_back, a, b, *problem.cost_inputs)


def _relaxed(
    problem: Problem, form: NormalForm, potentials: Potentials
) -> tuple[Tensor, Tensor, Tensor]:
    """The value of problems with a relaxed marginal, and its gradients in a and b."""
    normal, dtype, epsilon = form.problem, potentials.f.dtype, problem.epsilon
    log_columns = normal.target.optimal_log_ratio(potentials.g, potentials.log_rows)
    if normal.target.free and not problem.symmetric:
        softmin = form.ground.kernel.transposed.softmin(potentials.f, normal.log_masses()[0])
        log_columns = (potentials.g - softmin) / epsilon
    total_a, total_b = (x.to(dtype).sum(-1, keepdim=True) for x in (problem.a, problem.b))
    f, g = potentials.f + form.source_shift, potentials.g + form.target_shift
    log_rows = potentials.log_rows + form.log_mass - total_a.log()
    log_columns = log_columns + form.log_mass - total_b.log()
    a, b = problem.a.to(dtype), problem.b.to(dtype)
    log_a, log_b = (None if x is None else x.to(dtype) for x in (problem.log_a, problem.log_b))
    # The masses of the plan and of a⊗b depend on a and b, too.
    worth_a, excess_a = _worth_and_excess(problem.source, a, log_a, f, log_rows, total_b)
    worth_b, excess_b = _worth_and_excess(problem.target, b, log_b, g, log_columns, total_a)
    grad_a, grad_b = worth_a - epsilon * excess_a, worth_b - epsilon * excess_b
    value = _total(a, log_a, grad_a) + _total(b, log_b, worth_b)
    return value, grad_a, grad_b


def _worth_and_excess(
    marginal: Marginal,
    masses: Tensor,
    logs: Tensor | None,
    potential: Tensor,
    log_sums: Tensor,
    other_total: Tensor,
) -> tuple[Tensor, Tensor]:
    """What a unit of mass adds to the dual, and to the masses of the plan and of −a⊗b.

    ``log_sums`` are the marginal of the plan over the masses. If there are log masses, both results
    are multiplied by the mass, without a factor that may overflow.
    """
    if logs is None:
        return marginal.worth(potential), excess_of(log_sums) + (1 - other_total)
    return marginal.worth_of(masses, logs, potential), (
        logs + log_sums
    ).exp() - masses * other_total


def _total(masses: Tensor, logs: Tensor | None, worth: Tensor) -> Tensor:
    return torch.linalg.vecdot(masses, worth) if logs is None else worth.sum(-1)


def sharp_value(
    problem: Problem,
    form: NormalForm,
    potentials: Potentials,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, bool]:
    """⟨P, C⟩ of the normal form of every problem, ``(B,)``, and whether its gradients were found.

    The gradients of balanced problems are computed by implicit differentiation.
    """
    normal, kernel = form.problem, form.ground.kernel
    a, b, cost, epsilon = normal.a, normal.b, normal.cost, normal.epsilon
    f, g = potentials.f, potentials.g
    row_cost = kernel.mean_cost(f, g, b)
    value = torch.linalg.vecdot(a, row_cost)
    differentiated = any(x.requires_grad for x in (problem.a, problem.b, *problem.cost_inputs))
    if not (differentiated and torch.is_grad_enabled()):
        return value.to(problem.a.dtype), True
    x, y, solved = _solve_adjoint(normal, kernel, potentials, row_cost, tolerance, max_iterations)

    def pull_back(weights, needed):
        assert isinstance(cost, Tensor)  # with the sharp value, a lazy cost is a constant
        left = weights * a
        plan = kernel.coupling(f, g, left, b)
        moved = kernel.coupling(f, g, left * x, b) + kernel.coupling(f, g, left, b * y)
        return (plan + (moved - plan * cost) / epsilon,)

    source = x if problem.log_a is None else a * x
    target = y if problem.log_b is None else b * y
    return _attached(problem, value, source, target, pull_back), solved


@torch.no_grad()
def _solve_adjoint(
    problem: Problem,
    kernel: Kernel,
    potentials: Potentials,
    row_cost: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, bool]:
    """The pair (x, y) of the module's docstring, with ⟨a, x⟩ = ⟨b, y⟩, and whether it converged."""
    a, b, f, g = problem.a, problem.b, potentials.f, potentials.g
    # In the gradient an error of x is divided by ε. No step removes its rounding error.
    largest = problem.largest_cost or 1.0
    rounding = _ROUNDING * torch.finfo(a.dtype).eps * largest
    limit = max(tolerance * problem.epsilon * kernel.reach, rounding)
    row_sums = kernel.mean(f, g, b, torch.ones_like(b)).clamp(min=torch.finfo(b.dtype).tiny)
    change = a.new_full((len(a),), torch.inf)
    solved = False
    if problem.symmetric:
        x = next_x = row_cost / row_sums / 2
        accelerator = Anderson(a, x, largest)
        for _ in range(max_iterations):
            next_x = (row_cost - kernel.mean(f, g, a, x)) / row_sums
            change = (a * (x - next_x).abs()).sum(-1)
            solved = bool((change <= limit).all())
            if solved:
                break
            x = accelerator.next_point(x, (x + next_x) / 2, change / largest)
        return next_x, next_x, solved
    backward = kernel.transposed
    column_cost = backward.mean_cost(g, f, a)
    x = next_x = row_cost / row_sums
    accelerator = Anderson(a, x, largest)
    for _ in range(max_iterations):
        y = column_cost - backward.mean(g, f, a, x)
        next_x = (row_cost - kernel.mean(f, g, b, y)) / row_sums
        next_x = next_x - (a * next_x).sum(-1, keepdim=True)  # x + c, y − c also solves it
        change = (a * (x - next_x).abs()).sum(-1)
        solved = bool((change <= limit).all())
        if solved:
            break
        x = accelerator.next_point(x, next_x, change / largest)
    y = column_cost - backward.mean(g, f, a, next_x)
    shift = ((b * y).sum(-1, keepdim=True) - (a * next_x).sum(-1, keepdim=True)) / 2
    return next_x + shift, y - shift, solved
