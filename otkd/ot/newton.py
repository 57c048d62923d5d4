"""Potentials of problems with few targets, by Newton's method.

With the best f for a given g put in, the dual is a concave function of g alone, the *semi-dual*

    Σ_i a_i·softmin(g)_i + ⟨b, g⟩,    gradient b − c,   −ε·Hessian diag(c) − Πᵀ·diag(a)·Π,

Π the plan's rows over their masses and c its column sums. It is a log-sum-exp: a Newton step δ cut
to ln(1 + d)/d of it, d the range of δ/ε, always rises (Sun and Tran-Dinh, 2019, "Generalized
self-concordant functions", theorem 2), and near the optimum all of it is taken. Sinkhorn's own
update of g, which rises, too, goes between: it sets right at once the targets of little mass that
would shorten the step for all. So a handful of steps do where iterations need hundreds or
thousands, as between a few well-separated classes. It is done in float64: the Hessian has
eigenvalues down to exp(−C/ε).
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**17
_MARGIN = 1e-3  # of the tolerance: one more step, and rounding to float32 is what is left
_LEAST_EIGENVALUE = 1e-13
_LEAST_MASS = 1e-200


def newton_potentials(
    a: Tensor,
    b: Tensor,
    cost: Tensor,
    epsilon: float,
    *,
    start: Tensor,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, int]:
    """Potentials g ``(B, m)`` of balanced problems, from ``start``, and the most steps any took.

    ``a (B, n)``, ``b (B, m)`` and ``cost (n, m)`` or ``(B, n, m)``. In time O(B·n·m²), and the
    memory of a block of problems.
    """
    found, most = torch.empty_like(start), 0
    size = max(1, _BLOCK_ELEMENTS // cost.shape[-2:].numel())
    for block in torch.arange(len(b), device=b.device).split(size):
        x, y = (masses[block].double() for masses in (a, b))
        x, y = x / x.sum(-1, keepdim=True), y / y.sum(-1, keepdim=True)
        own = (cost if cost.ndim == 2 else cost[block]).double() / epsilon
        g = start[block].double() / epsilon
        g, steps = _ascend(x, y, own, g, _MARGIN * tolerance, max_steps)
        found[block] = (g * epsilon).to(found.dtype)
        most = max(most, steps)
    return found, most


def _ascend(
    a: Tensor, b: Tensor, cost: Tensor, g: Tensor, limit: float, max_steps: int
) -> tuple[Tensor, int]:
    """The potentials g of a block, and the steps it took; g and the cost are in units of ε."""
    found, steps = g, 0
    unsolved = torch.arange(len(b), device=b.device)
    while len(unsolved) and steps < max_steps:
        steps += 1
        f = -torch.logsumexp((g + b.log()).unsqueeze(-2) - cost, -1)
        g = -torch.logsumexp((f + a.log()).unsqueeze(-1) - cost, -2)
        rows = ((g + b.log()).unsqueeze(-2) - cost).softmax(-1)
        columns = (a.unsqueeze(-2) @ rows).squeeze(-2)
        missing = b - columns
        found[unsolved] = g
        go_on = (missing.abs().sum(-1) > limit).nonzero().squeeze(-1)
        if len(go_on) < len(unsolved):
            unsolved, g, a, b, rows, columns, missing = (
                x[go_on] for x in (unsolved, g, a, b, rows, columns, missing)
            )
            cost = cost if cost.ndim == 2 else cost[go_on]
        step = _newton_step(a, rows, columns, missing)
        reach = (step.amax(-1, keepdim=True) - step.amin(-1, keepdim=True)).clamp(min=1e-30)
        g = g + step * (reach.log1p() / reach)
    return found, steps


def _newton_step(a: Tensor, rows: Tensor, columns: Tensor, missing: Tensor) -> Tensor:
    """The solution δ of (diag(c) − Πᵀ·diag(a)·Π)·δ = b − c, scaled so that its diagonal is ≤ 1."""
    scale = columns.clamp(min=_LEAST_MASS).rsqrt()
    weighted = rows * scale.unsqueeze(-2)
    hessian = -((weighted * a.unsqueeze(-1)).mT @ weighted)
    hessian.diagonal(dim1=-2, dim2=-1).add_(1 + _LEAST_EIGENVALUE)
    solution, _ = torch.linalg.solve_ex(hessian, (missing * scale).unsqueeze(-1))
    return solution.squeeze(-1) * scale
