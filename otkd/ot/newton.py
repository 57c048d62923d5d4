"""Potentials of problems with few targets, by Newton's method.

With the best f for a given g put in, the dual is a concave function of g alone, the *semi-dual*.
With Π the rows of the plan over their masses r, r = a and β = b where the marginals are held,
r = a·exp(−softmin(g)/(ρ_a + ε)) and β = b·exp(−g/ρ_b) where they are penalised, and c = Πᵀ·r,

    gradient β − c,    −ε·Hessian diag(c + ε·β/ρ_b) − ρ_a/(ρ_a + ε)·Πᵀ·diag(r)·Π.

It is made of exponentials: with θ = max(3/(1 + ρ_a/ε), ε/ρ_b) and d the range of δ/ε and θ times
its largest entry, a Newton step δ cut to ln(1 + d)/d of it always rises (Sun and Tran-Dinh, 2019,
"Generalized self-concordant functions", theorem 2), and near the optimum all of it is taken.
Sinkhorn's own update of g, which rises, too, goes between: it sets right at once the targets of
little mass that would shorten the step for all. So a handful of steps do where iterations need
hundreds or thousands, as between a few well-separated classes, or where ρ is large. It is done in
float64: the Hessian has eigenvalues down to exp(−C/ε).

At an ε far below the range of the costs a step that is cut is short beside the way there. Then the
problem is first solved at a larger ε, and from there at ever smaller ones (Schmitzer, 2019,
"Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems"): a few steps
each, so that the number of steps grows as the logarithm of 1/ε.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otkd.ot.problem import HELD, Marginal

_BLOCK_ELEMENTS = 2**17
_MARGIN = 1e-3  # of the tolerance: one more step, and rounding to float32 is what is left
_LEAST_EIGENVALUE = 1e-13
_LEAST_MASS = 1e-200
_DIRECT = 100.0  # of the range over ε: up to there without larger ε
_RATIO = 4.0  # of one ε to the next
_COARSE = 1e-3  # the error at which the next is begun


def newton_potentials(
    a: Tensor,
    b: Tensor,
    cost: Tensor,
    epsilon: float,
    *,
    start: Tensor,
    tolerance: float,
    max_steps: int,
    penalties: tuple[float, float] = HELD,
) -> tuple[Tensor, int]:
    """Potentials g ``(B, m)``, from ``start``, and the most steps that any problem took.

    ``a (B, n)``, ``b (B, m)`` and ``cost (n, m)`` or ``(B, n, m)``. In time O(B·n·m²), and the
    memory of a block of problems.
    """
    found, most = torch.empty_like(start), 0
    if not len(b):
        return found, most
    penalties = penalties[0] / epsilon, penalties[1] / epsilon
    size = max(1, _BLOCK_ELEMENTS // cost.shape[-2:].numel())
    for block in torch.arange(len(b), device=b.device).split(size):
        x, y = (masses[block].double() for masses in (a, b))
        if penalties == HELD:
            x, y = x / x.sum(-1, keepdim=True), y / y.sum(-1, keepdim=True)
        own = (cost if cost.ndim == 2 else cost[block]).double() / epsilon
        g = start[block].double() / epsilon
        g, steps = _descend(x, y, own, g, penalties, _MARGIN * tolerance, max_steps)
        found[block] = (g * epsilon).to(found.dtype)
        most = max(most, steps)
    return found, most


def _descend(
    a: Tensor,
    b: Tensor,
    cost: Tensor,
    g: Tensor,
    penalties: tuple[float, float],
    limit: float,
    max_steps: int,
) -> tuple[Tensor, int]:
    """The potentials g of a block, by way of larger ε where they are far, and the steps it took.

    The potentials, the cost and the penalties are in units of ε.
    """
    reach = (cost.max() - cost.min()).item()
    levels = math.ceil(math.log(reach / _DIRECT, _RATIO)) if _DIRECT < reach < math.inf else 0
    steps = 0
    for level in range(levels, -1, -1):
        unit = _RATIO**level
        sides = Marginal(penalties[0] / unit), Marginal(penalties[1] / unit)
        error = max(limit, _COARSE) if level else limit
        g, taken = _ascend(a, b, cost / unit, g / unit, sides, error, max_steps - steps)
        g, steps = g * unit, steps + taken
    return g, steps


def _ascend(
    a: Tensor,
    b: Tensor,
    cost: Tensor,
    g: Tensor,
    sides: tuple[Marginal, Marginal],
    limit: float,
    max_steps: int,
) -> tuple[Tensor, int]:
    """The potentials g of a block, and the steps it took; all in units of ε."""
    source, target = sides
    damping = source.damping(1.0)
    # How fast masses change with the potentials; they do not where they are held.
    slope, target_slope = 1 / (1 + source.penalty), 1 / target.penalty
    found, steps = g, 0
    unsolved = torch.arange(len(b), device=b.device)
    while len(unsolved) and steps < max_steps:
        steps += 1
        f = -damping * torch.logsumexp((g + b.log()).unsqueeze(-2) - cost, -1)
        g = -target.damping(1.0) * torch.logsumexp((f + a.log()).unsqueeze(-1) - cost, -2)
        exponents = (g + b.log()).unsqueeze(-2) - cost
        log_sums = exponents.logsumexp(-1, keepdim=True)
        rows = (exponents - log_sums).exp_()
        row_masses = a * (slope * log_sums.squeeze(-1)).exp()
        wanted = b * (g * -target_slope).exp()
        columns = (row_masses.unsqueeze(-2) @ rows).squeeze(-2)
        missing = wanted - columns
        found[unsolved] = g
        # With penalised marginals, of the mass of the plan where that is less than theirs.
        error = missing.abs().sum(-1) / wanted.sum(-1).clamp(_LEAST_MASS, 1)
        go_on = (error > limit).nonzero().squeeze(-1)
        if len(go_on) < len(unsolved):
            unsolved, g, a, b, rows, row_masses, columns, wanted, missing = (
                x[go_on] for x in (unsolved, g, a, b, rows, row_masses, columns, wanted, missing)
            )
            cost = cost if cost.ndim == 2 else cost[go_on]
        diagonal = columns + target_slope * wanted
        step = _newton_step(damping * row_masses, rows, diagonal, missing)
        least, greatest = torch.aminmax(step, dim=-1, keepdim=True)
        furthest = torch.maximum(-least, greatest)
        reach = greatest - least + max(3 * slope, target_slope) * furthest
        reach = reach.clamp(min=1e-30)
        g = g + step * (reach.log1p() / reach)
    return found, steps


def _newton_step(weights: Tensor, rows: Tensor, diagonal: Tensor, missing: Tensor) -> Tensor:
    """The solution δ of (diag(d) − Πᵀ·diag(w)·Π)·δ = missing, scaled to a diagonal of at most 1."""
    scale = diagonal.clamp(min=_LEAST_MASS).rsqrt()
    weighted = rows * scale.unsqueeze(-2)
    hessian = -((weighted * weights.unsqueeze(-1)).mT @ weighted)
    hessian.diagonal(dim1=-2, dim2=-1).add_(1 + _LEAST_EIGENVALUE)
    solution, _ = torch.linalg.solve_ex(hessian, (missing * scale).unsqueeze(-1))
    return solution.squeeze(-1) * scale
