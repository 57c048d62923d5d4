"""Transport between the samples of a batch; a point is the distribution of a sample."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, cdist

from otkd.checks import check_choice, check_logits, check_not_negative
from otkd.compilation import outside_graphs
from otkd.costs import CostMatrices
from otkd.functional.l1_distances import l1_distances
from otkd.functional.wasserstein import distributions
from otkd.ot.divergence import DivergenceSolution, solve_divergence
from otkd.ot.kernels.line import LineCost
from otkd.ot.options import Objective, SolverSettings
from otkd.precision import inner_products, without_autocast
from otkd.scalars import as_flag

# Plain iterations per accelerated step: at most 18, and at most 2²¹ kernel entries in total. Chosen
# by timing.
_PLAIN_STEPS, _PLAIN_ENTRIES = 18, 2**21
_LINE_FROM = 384  # samples: for fewer, a matrix is faster
# Distance of (q, 1 − q) and (p, 1 − p), in |q − p|.
_SLOPES = {"l1": 2.0, "euclidean": math.sqrt(2)}
_NARROW = 64  # coordinates: up to here differences are as fast as products
BATCH_COSTS = ("l1", "euclidean", "sqeuclidean")


@outside_graphs
def batch_sinkhorn_distance(
    student_logits: Float[Tensor, "*batch samples vocab"],
    teacher_logits: Float[Tensor, "*batch samples vocab"],
    *,
    temperature: float = 2.0,
    teacher_temperature: float | None = None,
    cost: str = "l1",
    sample_cost: float = 0.0,
    epsilon: float = 0.1,
    debias: bool = True,
    value: str = "dual",
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
) -> Float[Tensor, "*batch"]:
    """Entropic transport between the b student samples and the b teacher samples of a batch.

    Sample i is the point q_i = softmax(student_logits_i / T) with mass 1/b, and the cost between
    two points is their distance. Gradients flow through the costs.

    Args:
        student_logits: ``(*batch, b, vocab)``.
        teacher_logits: ``(*batch, b, vocab)``, a constant.
        temperature: divides the logits of both sides.
        teacher_temperature: if given, divides the teacher's logits instead.
        cost: ``"l1"``, ``"euclidean"`` or ``"sqeuclidean"`` distance of the distributions.
        sample_cost: added to the cost of moving mass from one sample to another.
        epsilon: strength of the entropic regularisation, in units of the cost.
        debias: subtract half the transport of each side to itself, so that the value is 0 if both
            sides are equal.
        value: ``"dual"`` or ``"sharp"``; see :func:`otkd.ot.sinkhorn_divergence`.
        max_iterations: limit of the solver.
        tolerance: L1 marginal error at which a batch counts as solved.

    Raises:
        TypeError, ValueError: for wrong shapes, parameters out of range, or NaN.

    Source: Cui et al. (2024), "SinKD: Sinkhorn Distance Minimization for Knowledge Distillation".
    """
    check_logits(student_logits, teacher_logits)
    if student_logits.ndim < 2 or student_logits.shape[-2] == 0:
        raise ValueError(
            "batch transport needs samples in dimension −2, shape (*batch, samples, vocab), with "
            f"at least one sample, got {tuple(student_logits.shape)}"
        )
    q, p = distributions(
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
    )
    objective = Objective(epsilon=epsilon, value=value, debias=as_flag("debias", debias))
    solver = SolverSettings(tolerance=tolerance, max_iterations=max_iterations)
    solution = transport_between_points(q, p, cost, objective, solver, sample_cost=sample_cost)
    return solution.value


def transport_between_points(
    x: Tensor,
    y: Tensor,
    cost: str,
    objective: Objective,
    solver: SolverSettings,
    *,
    normalize: bool = False,
    sample_cost: float = 0.0,
) -> DivergenceSolution:
    """Transport between uniform masses on the points ``x`` and ``y``, ``(*batch, b, d)``.

    With ``normalize``, all distances are divided by their mean between the two sides, a constant.
    Otherwise the points must be distributions. ``sample_cost`` is added to the cost between
    different samples.
    """
    check_choice("cost", cost, BATCH_COSTS)
    check_not_negative(sample_cost=sample_cost)
    pairs = [(x, y), (x, x), (y, y)] if objective.debias is not None else [(x, y)]
    if not (normalize or sample_cost) and _on_a_line(x, cost, objective):
        lines = [LineCost(s[:, 0], t[:, 0], _SLOPES[cost]) for s, t in pairs]
        costs = [cast(Tensor, line) for line in lines]  # a lazy cost may replace a matrix
    else:
        with without_autocast(x):
            costs = [point_distances(s, t, cost) for s, t in pairs]
            if normalize:
                mean = costs[0].detach().mean((-2, -1), keepdim=True)
                # If all points are equal the mean is 0, and there is nothing to transport.
                scale = torch.where(mean > 0, mean, 1.0)
                costs = [matrix / scale for matrix in costs]
            if sample_cost:
                apart = 1 - torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
                costs = [matrix + sample_cost * apart for matrix in costs]
    plain_steps = min(_PLAIN_STEPS, _PLAIN_ENTRIES // x.shape[-2] ** 2)
    solver = replace(solver, plain_steps=plain_steps)
    uniform = x.new_full(x.shape[:-1], 1 / x.shape[-2])
    return solve_divergence(uniform, uniform, CostMatrices(*costs), objective, solver)


def _on_a_line(x: Tensor, cost: str, objective: Objective) -> bool:
    """Whether the points are many distributions over two classes, each given by one probability."""
    return (
        x.ndim == 2
        and x.shape[-1] == 2
        and len(x) > _LINE_FROM
        and cost in _SLOPES
        and objective.value == "dual"
        and LineCost.represents(_SLOPES[cost], objective.epsilon, x.dtype)
    )


def point_distances(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Distances ``(*batch, n, m)`` between points ``(*batch, n, d)`` and ``(*batch, m, d)``."""
    if metric == "l1":
        return l1_distances(x, y)
    if metric == "euclidean":
        # Computed from products, small distances and their gradients are lost to rounding.
        direct = x.shape[-1] <= _NARROW
        mode = "donot_use_mm_for_euclid_dist" if direct else "use_mm_for_euclid_dist_if_necessary"
        return cdist(x, y, compute_mode=mode)
    # Remove the mean, which does not change distances but would cost digits: hidden states of
    # transformers have a few large entries that hardly vary.
    centre = y.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * inner_products(x, y)).clamp(min=0)
