"""Newton's method for problems with few targets.

With the best f for a given g, the dual is a concave function of g alone, the *semi-dual*. Let Π be
the rows of the plan divided by their masses r. If the marginals are held, r = a and β = b. If they
are relaxed, r = a·exp(−softmin(g)/(ρ_a + ε)) and β = b·exp(−g/ρ_b). With c = Πᵀ·r,

    gradient β − c,    −ε·Hessian diag(c + ε·β/ρ_b) − ρ_a/(ρ_a + ε)·Πᵀ·diag(r)·Π.

Let θ = max(3/(1 + ρ_a/ε), ε/ρ_b), and let d be the larger of the range of δ/ε and θ times its
largest entry. Then a Newton step δ multiplied by ln(1 + d)/d always increases the semi-dual (Sun
and Tran-Dinh, 2019, "Generalized self-concordant functions", theorem 2), and near the optimum the
full step is taken. Between Newton steps, Sinkhorn's update of g is applied, which also increases
the semi-dual: it immediately corrects targets of little mass that would otherwise shorten the step.
A handful of steps replaces hundreds or thousands of iterations, for example between a few
well-separated classes, or for large ρ. All is computed in float64, because the Hessian has
eigenvalues down to exp(−C/ε).

If ε is far below the range of the costs, a shortened step is small compared with the distance to
the optimum. The problem is then solved for a larger ε first, and from there for decreasing ε
(Schmitzer, 2019, "Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport
Problems"), with a few steps each, so that the number of steps grows with the logarithm of 1/ε.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otkd.ot.problem import HELD, Marginal

_BLOCK_ELEMENTS = 2**17
_MARGIN = 1e-3  # times the tolerance: after one more step only float32 rounding is left
_LEAST_EIGENVALUE = 1e-13
_LEAST_MASS = 1e-200
_DIRECT = 100.0  # range of the costs over ε up to which no larger ε is solved first
_RATIO = 4.0  # ratio of successive ε
_COARSE = 1e-3  # error at which the next ε begins


def newton_potentials(
    log_a: Tensor,
    log_b: Tensor,
    cost: Tensor,
    epsilon: float,
    *,
    start: Tensor,
    tolerance: float,
    max_steps: int,
    penalties: tuple[float, float] = HELD,
) -> tuple[Tensor, int]:
    """Potentials g ``(B, m)``, from ``start``, and the largest number of steps of any problem.

    ``log_a (B, n)`` and ``log_b (B, m)`` are logarithms of the masses, and ``cost`` is ``(n, m)``
    or ``(B, n, m)``. Takes time O(B·n·m²), and the memory of a block of problems.
    """
    found, most = torch.empty_like(start), 0
    if not len(log_b):
        return found, most
    penalties = penalties[0] / epsilon, penalties[1] / epsilon
    size = max(1, _BLOCK_ELEMENTS // cost.shape[-2:].numel())
    for block in torch.arange(len(log_b), device=log_b.device).split(size):
        x, y = (logs[block].double() for logs in (log_a, log_b))
        if penalties == HELD:
            x, y = x.log_softmax(-1), y.log_softmax(-1)
        own = (cost if cost.ndim == 2 else cost[block]).double() / epsilon
        g = start[block].double() / epsilon
        g, steps = _descend(x, y, own, g, penalties, _MARGIN * tolerance, max_steps)
        found[block] = (g * epsilon).to(found.dtype)
        most = max(most, steps)
    return found, most


def _descend(
    log_a: Tensor,
    log_b: Tensor,
    cost: Tensor,
    g: Tensor,
    penalties: tuple[float, float],
    limit: float,
    max_steps: int,
) -> tuple[Tensor, int]:
    """The potentials g of a block, by way of larger ε if they are far, and the number of steps.

    Potentials, cost and penalties are in units of ε.
    """
    reach = (cost.max() - cost.min()).item()
    levels = math.ceil(math.log(reach / _DIRECT, _RATIO)) if _DIRECT < reach < math.inf else 0
    steps = 0
    for level in range(levels, -1, -1):
        unit = _RATIO**level
        sides = Marginal(penalties[0] / unit), Marginal(penalties[1] / unit)
        error = max(limit, _COARSE) if level else limit
        g, taken = _ascend(log_a, log_b, cost / unit, g / unit, sides, error, max_steps - steps)
        g, steps = g * unit, steps + taken
    return g, steps


def _ascend(
    log_a: Tensor,
    log_b: Tensor,
    cost: Tensor,
    g: Tensor,
    sides: tuple[Marginal, Marginal],
    limit: float,
    max_steps: int,
) -> tuple[Tensor, int]:
    """The potentials g of a block, and the number of steps; all in units of ε."""
    source, target = sides
    damping = source.damping(1.0)
    # Derivative of the masses in the potentials; 0 for a side that is held.
    slope, target_slope = 1 / (1 + source.penalty), 1 / target.penalty
    found, steps = g, 0
    unsolved = torch.arange(len(g), device=g.device)
    while len(unsolved) and steps < max_steps:
        steps += 1
        f = -damping * torch.logsumexp((g + log_b).unsqueeze(-2) - cost, -1)
        g = -target.damping(1.0) * torch.logsumexp((f + log_a).unsqueeze(-1) - cost, -2)
        exponents = (g + log_b).unsqueeze(-2) - cost
        log_sums = exponents.logsumexp(-1, keepdim=True)
        rows = (exponents - log_sums).exp_()
        row_masses = (log_a + slope * log_sums.squeeze(-1)).exp()
        wanted = (log_b - g * target_slope).exp()
        columns = (row_masses.unsqueeze(-2) @ rows).squeeze(-2)
        missing = wanted - columns
        found[unsolved] = g
        # With relaxed marginals, relative to the mass of the plan if that is smaller.
        error = missing.abs().sum(-1) / wanted.sum(-1).clamp(_LEAST_MASS, 1)
        go_on = (error > limit).nonzero().squeeze(-1)
        if len(go_on) < len(unsolved):
            unsolved, g, log_a, log_b, rows, row_masses, columns, wanted, missing = (
                x[go_on]
                for x in (unsolved, g, log_a, log_b, rows, row_masses, columns, wanted, missing)
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
