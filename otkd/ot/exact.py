"""Exact transport: closed forms, or a linear program."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from otkd.checks import check_positive
from otkd.costs import Cost, CostMatrices, DiscreteCost, OrdinalCost, as_cost_matrices
from otkd.ot.problem import check_costs, check_masses, flatten_problem

LARGEST_PROGRAM = 1024
"""Largest vocabulary for which a loss solves linear programs, one per position."""


def wasserstein(
    a: Float[Tensor, "*batch n"],
    b: Float[Tensor, "*#batch m"],
    cost: Float[Tensor, "*#batch n m"] | Cost,
    *,
    p: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Exact optimal transport: the minimum of ⟨P, C^p⟩ over plans P with marginals a and b.

    No root 1/p is taken. Closed forms exist for :class:`~otkd.costs.DiscreteCost` (total
    variation), for :class:`~otkd.costs.OrdinalCost` with a convex cost (the monotone plan), and for
    two points on each side. Otherwise POT's network simplex solves one problem at a time, in
    float64 on the CPU. Its dual potentials are the gradients in a and b, and its plan is the
    gradient in the cost.

    Args:
        a: source masses; each vector adds up to 1.
        b: target masses; each vector adds up to 1.
        cost: a tensor ``(n, m)`` or ``(*batch, n, m)``, or a cost object.
        p: power of the cost, above 0.

    Returns:
        The values, differentiable in a, b and cost; a subgradient if the plan is degenerate.

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: for shapes that do not fit, masses that are not a distribution, or p not above
            0.
        RuntimeError: if the linear program is not solved.

    Source: Peyré and Cuturi (2019), "Computational Optimal Transport", chapters 2 and 3.

    Example:
        >>> a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.5])
        >>> otkd.ot.wasserstein(a, b, otkd.costs.OrdinalCost())
        tensor(1.5000)
    """
    check_positive(p=p)
    check_masses(a, b)
    solve = _closed_form(cost, p)
    if solve is not None and a.shape[-1] == b.shape[-1]:
        return solve(a, b)
    if isinstance(cost, Cost):
        matrix = as_cost_matrices(cost.power(p), a, b).cross
    else:
        matrix = as_cost_matrices(cost, a, b).cross
        matrix = matrix if p == 1 else matrix**p
    check_costs(a.shape[-1], b.shape[-1], CostMatrices(matrix))
    flat_a, flat_b, flat_cost, batch = flatten_problem(a, b, matrix)
    assert isinstance(flat_cost, Tensor)
    if a.shape[-1] == b.shape[-1] == 2:
        return _two_points(flat_a, flat_b, flat_cost).reshape(batch)
    return _LinearProgram.apply(flat_a, flat_b, flat_cost).reshape(batch)


def exact_transport(a: Tensor, b: Tensor, cost: Cost | Tensor, *, p: float = 1.0) -> Tensor:
    """:func:`wasserstein`, restricted to sizes for which one program per position is feasible."""
    largest = max(a.shape[-1], b.shape[-1])
    if _closed_form(cost, p) is None and largest > LARGEST_PROGRAM:
        raise ValueError(
            f"exact transport over {largest} tokens would solve one linear program of that size "
            f"per position; the limit is {LARGEST_PROGRAM} tokens. Use SinkhornLoss, or a cost "
            "with a closed form (DiscreteCost, OrdinalCost)"
        )
    return wasserstein(a, b, cost, p=p)


def _closed_form(cost: Cost | Tensor, p: float) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The function for exact transport without a linear program, or None."""
    powered = cost.power(p) if isinstance(cost, Cost) else None
    if isinstance(powered, DiscreteCost):
        return lambda a, b: (a - b).abs().sum(-1) / 2
    if isinstance(powered, OrdinalCost) and powered.p >= 1:
        return functools.partial(_monotone_transport, p=powered.p)
    return None


def _monotone_transport(a: Tensor, b: Tensor, p: float) -> Tensor:
    """The sorted plan between masses at the places 0 … n−1, optimal for |i − j|^p with p ≥ 1."""
    a, b = torch.broadcast_tensors(a, b)
    cdf_a, cdf_b = a.cumsum(-1), b.cumsum(-1)
    if p == 1:
        return (cdf_a - cdf_b)[..., :-1].abs().sum(-1)
    # Between two consecutive levels of either CDF, mass goes from one place to one other.
    levels = torch.cat([cdf_a, cdf_b], -1).sort(-1).values
    moved = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1]))
    middle = (levels - moved / 2).detach().contiguous()
    last = a.shape[-1] - 1
    source = torch.searchsorted(cdf_a.detach().contiguous(), middle).clamp(max=last)
    target = torch.searchsorted(cdf_b.detach().contiguous(), middle).clamp(max=last)
    return (moved * (source - target).abs().to(moved.dtype) ** p).sum(-1)


def _two_points(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
    """Transport between two and two points, determined by the mass that stays at the first."""
    c00, c01, c10, c11 = (cost[..., i, j] for i in (0, 1) for j in (0, 1))
    most = torch.minimum(a[:, 0], b[:, 0])
    least = (a[:, 0] - b[:, 1]).clamp(min=0)
    # Differences first: a common constant would cost digits of the sums.
    stay = torch.where(c00 - c01 <= c10 - c11, most, least)
    return (
        stay * c00
        + (a[:, 0] - stay) * c01
        + (b[:, 0] - stay) * c10
        + (a[:, 1] - b[:, 0] + stay) * c11
    )


class _LinearProgram(torch.autograd.Function):
    """One network simplex per problem, by POT."""

    @staticmethod
    def forward(ctx, a, b, cost):
        import numpy as np

        ot = _import_pot()
        solved = []
        costs = cost.detach().double().cpu().numpy()
        for index, (source, target) in enumerate(zip(_normalised(a), _normalised(b), strict=True)):
            matrix = costs if costs.ndim == 2 else costs[index]
            rows, columns = source.nonzero()[0], target.nonzero()[0]
            block = matrix[rows[:, None], columns[None, :]]
            # The simplex compares with absolute constants, so scale its costs to 0 … 1.
            least, span = block.min(), np.ptp(block)
            span = span if span > 0 else 1.0
            plan, log = ot.emd(
                source[rows], target[columns], (block - least) / span, numItermax=10**7, log=True
            )
            if log["warning"] is not None:
                raise RuntimeError(f"linear program {index} was not solved: {log['warning']}")
            u, v = (span * potential + least / 2 for potential in (log["u"], log["v"]))
            solved.append(_extend(matrix, rows, columns, plan, u, v))
        f, g, plans, values = (torch.stack(part).to(a) for part in zip(*solved, strict=True))
        ctx.save_for_backward(f, g, plans)
        ctx.shared_cost = cost.ndim == 2
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values):  # pyright: ignore[reportIncompatibleMethodOverride]
        f, g, plans = ctx.saved_tensors
        grad_cost = None
        if ctx.needs_input_grad[2]:
            grad_cost = grad_values[:, None, None] * plans
            grad_cost = grad_cost.sum(0) if ctx.shared_cost else grad_cost
        weights = grad_values.unsqueeze(-1)
        return weights * f, weights * g, grad_cost


def _import_pot():
    """POT, imported late: it takes seconds, and may load KeOps, which prints as it is imported."""
    with contextlib.redirect_stdout(io.StringIO()):
        import ot
    return ot


def _normalised(masses: Tensor):
    """float64 on the CPU, adding up to exactly what the simplex demands."""
    masses = masses.detach().double().cpu()
    return (masses / masses.sum(-1, keepdim=True)).numpy()


def _extend(matrix, rows, columns, plan, u, v):
    """Potentials at points without mass, by f_i = min_j C_ij − g_j, and the plan in full size."""
    import numpy as np

    full_plan = np.zeros_like(matrix)
    full_plan[rows[:, None], columns[None, :]] = plan
    f = (matrix[:, columns] - v[None, :]).min(1)
    f[rows] = u
    g = (matrix - f[:, None]).min(0)
    g[columns] = v
    value = (full_plan * matrix).sum()
    return tuple(torch.as_tensor(part) for part in (f, g, full_plan, value))
