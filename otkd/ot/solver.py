"""Sinkhorn's iterations on dual potentials. Nothing here knows of autograd.

The entropic problem (see :class:`otkd.ot.problem.Problem`) has the dual

    max over f, g of ⟨a, f⟩ + ⟨b, g⟩ − ε·(Σ_ij a_i·b_j·exp((f_i + g_j − C_ij)/ε) − 1),

which alternating exact maximisation solves: f ← softmin(g), g ← softmin(f). Where a = b and the
cost is symmetric, f ← ½(f + softmin(f)) needs a few iterations only (Feydy et al., 2019,
"Interpolating between Optimal Transport and MMD using Sinkhorn Divergences"). The soft minimum
defines the potentials at points without mass, too.

Sinkhorn's rate tends to 1 as the plan tends to a diagonal: between two classes at a cost of 20ε it
needs thousands of iterations. With two targets one number is unknown, t = g_0 − g_1, and the mass
that arrives at the first target rises with it, so it is found by bisection instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.ot.kernels import Kernel
from otkd.ot.problem import Problem


@dataclass(frozen=True)
class Potentials:
    """Dual potentials and how far they are from optimal.

    Attributes:
        f, g: ``(B, n)``, ``(B, m)``, with ⟨a, f⟩ = ⟨b, g⟩.
        marginal_error: ``Σ_i |Σ_j P_ij − a_i|``, ``(B,)``. The columns are exact, or (symmetric
            problems) off by the same.
        excess_mass: ``Σ_ij P_ij − 1``, ``(B,)``; not zero for symmetric problems alone.
        iterations: number of updates of both potentials.
        converged: whether every marginal error is within the tolerance.
    """

    f: Tensor
    g: Tensor
    marginal_error: Tensor
    excess_mass: Tensor
    iterations: int
    converged: bool


@torch.no_grad()
def solve_potentials(
    problem: Problem, kernel: Kernel, *, tolerance: float, max_iterations: int
) -> Potentials:
    """Iterate until the L1 marginal error of every problem is at most ``tolerance``."""
    if problem.symmetric:
        return _solve_symmetric(problem, kernel, tolerance, max_iterations)
    start = torch.zeros_like(problem.b)
    if problem.b.shape[-1] == 2:
        start = _two_target_potentials(problem)
    return _solve_alternating(problem, kernel, start, tolerance, max_iterations)


def _two_target_potentials(problem: Problem) -> Tensor:
    """Potentials (t, 0): Σ_i a_i·σ((t − d_i)/ε + log b_0/b_1) = b_0 with d_i = C_i0 − C_i1."""
    a, b, cost = problem.a.double(), problem.b.double(), problem.cost.double()
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    difference = cost[..., 0] - cost[..., 1]
    odds = (b[:, :1].log() - b[:, 1:].log()).clamp(-1e4, 1e4)
    # Of σ at all sources one is at most and one at least b_0: t lies between the differences.
    low = difference.amin(-1, keepdim=True).expand_as(odds)
    high = difference.amax(-1, keepdim=True).expand_as(odds)
    # The smaller target is the one whose mass has no digits to lose.
    sign = torch.where(b[:, :1] <= b[:, 1:], 1.0, -1.0)
    smaller = b.amin(-1, keepdim=True)
    for _ in range(64):
        t = (low + high) / 2
        arrives = torch.sigmoid(sign * ((t - difference) / problem.epsilon + odds))
        too_high = sign * ((a * arrives).sum(-1, keepdim=True) - smaller) > 0
        low, high = torch.where(too_high, low, t), torch.where(too_high, t, high)
    t = (low + high) / 2
    return torch.cat([t, torch.zeros_like(t)], -1).to(problem.b)


def _solve_alternating(problem, kernel, start, tolerance, max_iterations) -> Potentials:
    a, b, epsilon = problem.a, problem.b, problem.epsilon
    log_a, log_b = a.log(), b.log()
    backward = kernel.transposed
    next_f = kernel.softmin(start, log_b)
    iteration = 0
    while True:
        iteration += 1
        f = next_f
        g = backward.softmin(f, log_a)
        # The next update tells the row sums of the plan of (f, g): Σ_j P_ij = a_i·exp((f − f')/ε).
        # The columns were updated last and are exact; testing them would pass at once.
        next_f = kernel.softmin(g, log_b)
        error = (a * torch.expm1((f - next_f) / epsilon).abs()).sum(-1)
        converged = _all_within(error, tolerance)
        if converged or iteration == max_iterations:
            break
    shift = ((b * g).sum(-1, keepdim=True) - (a * f).sum(-1, keepdim=True)) / 2
    return Potentials(f + shift, g - shift, error, torch.zeros_like(error), iteration, converged)


def _solve_symmetric(problem, kernel, tolerance, max_iterations) -> Potentials:
    a, epsilon = problem.a, problem.epsilon
    log_a = a.log()
    f = kernel.softmin(torch.zeros_like(a), log_a) / 2
    iteration = 0
    while True:
        iteration += 1
        next_f = kernel.softmin(f, log_a)
        excess = a * torch.expm1((f - next_f) / epsilon)
        error = excess.abs().sum(-1)
        converged = _all_within(error, tolerance)
        if converged or iteration == max_iterations:
            break
        f = (f + next_f) / 2
    return Potentials(f, f, error, excess.sum(-1), iteration, converged)


def _all_within(error: Tensor, tolerance: float) -> bool:
    return bool((error <= tolerance).all())
