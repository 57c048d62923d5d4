"""Gradients of transport: by the envelope theorem, or implicitly. The only autograd of the core.

At the optimum the derivative of the dual value is that of the Lagrangian with the potentials held
fixed: ∂OT/∂a = f, ∂OT/∂b = g, ∂OT/∂C = P. No iteration is recorded and none is repeated.

The sharp value V = ⟨P, C⟩ has no such theorem. Differentiating the optimality conditions

    Σ_j b_j·E_ij = 1,   Σ_i a_i·E_ij = 1,   E = exp((f + g − C)/ε)

and eliminating df, dg by the adjoint (x, y) that solves

    x_i = Σ_j b_j·E_ij·(C_ij − y_j),   y_j = Σ_i a_i·E_ij·(C_ij − x_i)

gives ∂V/∂a = x, ∂V/∂b = y and ∂V/∂C = P∘(1 + (x⊕y − C)/ε). The system is Sinkhorn's iteration
linearised: it is solved by the same alternation at the same rate, in the same memory. Where the
solver stopped early the sums of b_j·E_ij are not 1, and the linearised conditions have them as
factors of x_i and y_j: divided by them the alternation averages, and cannot diverge. It is
accelerated as the solver's is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otkd.checks import refuse_second_derivative
from otkd.ot.acceleration import Anderson
from otkd.ot.kernels import Kernel
from otkd.ot.problem import Problem
from otkd.ot.solution import warn_not_converged
from otkd.ot.solver import Potentials
from otkd.precision import without_autocast

_ROUNDING = 4.0  # of the largest cost, in its last bits
_CHANGE = "the change of the adjoint, which the gradient of ⟨P, C⟩ is made of,"


class _WithGradient(torch.autograd.Function):
    """A value that was computed without autograd, with the gradients that belong to it."""

    @staticmethod
    def forward(ctx, value, grad_a, grad_b, pull_back, a, b, *cost_inputs):
        ctx.save_for_backward(grad_a, grad_b)
        # Where none is wanted the kernel is let go.
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
                grad_inputs = ctx.pull_back(weights, needed)
        return (
            *(None,) * 4,
            weights * grad_a if needs_a else None,
            weights * grad_b if needs_b else None,
            *grad_inputs,
        )


def dual_value(problem: Problem, kernel: Kernel, potentials: Potentials) -> Tensor:
    """OT_ε of every problem, ``(B,)``, with its envelope gradients in a, b and the cost."""
    a, b, epsilon = problem.a.detach(), problem.b.detach(), problem.epsilon
    f, g = potentials.f, potentials.g
    grad_a, grad_b = problem.worth(f), problem.worth(g)
    value = (a * grad_a).sum(-1) + (b * grad_b).sum(-1)
    excess = potentials.row_excess
    if not problem.balanced:
        # The mass of the plan and of a⊗b both depend on a and b.
        surplus_a, surplus_b = a.sum(-1, keepdim=True) - 1, b.sum(-1, keepdim=True) - 1
        column_excess = excess if problem.symmetric else problem.optimal_row_excess(g)
        grad_a = grad_a - epsilon * (excess - surplus_b)
        grad_b = grad_b - epsilon * (column_excess - surplus_a)
        value = value - epsilon * (a * (excess - surplus_b)).sum(-1)
    elif problem.symmetric:
        value = value - epsilon * (a * excess).sum(-1)

    def pull_back(weights, needed):
        return kernel.pull_back(f, g, weights * a, b, needed)

    return _WithGradient.apply(
        value, grad_a, grad_b, pull_back, problem.a, problem.b, *problem.cost_inputs
    )


def sharp_value(
    problem: Problem,
    kernel: Kernel,
    potentials: Potentials,
    *,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """⟨P, C⟩ of every problem, ``(B,)``, with gradients by implicit differentiation."""
    a, b, cost = problem.a.detach(), problem.b.detach(), problem.cost.detach()
    f, g, epsilon = potentials.f, potentials.g, problem.epsilon
    row_cost = kernel.mean_cost(f, g, b)
    value = (a * row_cost).sum(-1)
    differentiated = any(x.requires_grad for x in (problem.a, problem.b, *problem.cost_inputs))
    if not (differentiated and torch.is_grad_enabled()):
        return value
    x, y = _solve_adjoint(problem, kernel, potentials, row_cost, tolerance, max_iterations)

    def pull_back(weights, needed):
        assert isinstance(cost, Tensor)  # a lazy cost is a constant where the value is sharp
        left = weights * a
        plan = kernel.coupling(f, g, left, b)
        moved = kernel.coupling(f, g, left * x, b) + kernel.coupling(f, g, left, b * y)
        return (plan + (moved - plan * cost) / epsilon,)

    return _WithGradient.apply(value, x, y, pull_back, problem.a, problem.b, *problem.cost_inputs)


@torch.no_grad()
def _solve_adjoint(
    problem: Problem,
    kernel: Kernel,
    potentials: Potentials,
    row_cost: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    """The pair (x, y) of the module's docstring, with ⟨a, x⟩ = ⟨b, y⟩."""
    a, b, f, g = problem.a, problem.b, potentials.f, potentials.g
    # In the gradient an error of x is divided by ε; what rounding leaves of it no step removes.
    rounding = _ROUNDING * torch.finfo(a.dtype).eps * float(problem.largest_cost)
    limit = max(tolerance * problem.epsilon, rounding)
    row_sums = kernel.mean(f, g, b, torch.ones_like(b)).clamp(min=torch.finfo(b.dtype).tiny)
    change = a.new_full((len(a),), torch.inf)
    if problem.symmetric:
        x = next_x = row_cost / row_sums / 2
        accelerator = Anderson(a, x)
        for _ in range(max_iterations):
            next_x = (row_cost - kernel.mean(f, g, a, x)) / row_sums
            change = (a * (x - next_x).abs()).sum(-1)
            if (change <= limit).all():
                break
            x = accelerator.next_point(x, (x + next_x) / 2, change)
        else:
            warn_not_converged(max_iterations, change, limit, _CHANGE)
        return next_x, next_x
    backward = kernel.transposed
    column_cost = backward.mean_cost(g, f, a)
    x = next_x = row_cost / row_sums
    accelerator = Anderson(a, x)
    for _ in range(max_iterations):
        y = column_cost - backward.mean(g, f, a, x)
        next_x = (row_cost - kernel.mean(f, g, b, y)) / row_sums
        next_x = next_x - (a * next_x).sum(-1, keepdim=True)  # x + c, y − c is as good
        change = (a * (x - next_x).abs()).sum(-1)
        if (change <= limit).all():
            break
        x = accelerator.next_point(x, next_x, change)
    else:
        warn_not_converged(max_iterations, change, limit, _CHANGE)
    y = column_cost - backward.mean(g, f, a, next_x)
    shift = ((b * y).sum(-1, keepdim=True) - (a * next_x).sum(-1, keepdim=True)) / 2
    return next_x + shift, y - shift
