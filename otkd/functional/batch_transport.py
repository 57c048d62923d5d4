"""Transport between the samples of a batch, with their distributions as points."""

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
from otkd.functional.transport import distributions
from otkd.ot.divergence import DivergenceSolution, solve_divergence
from otkd.ot.kernels.line import LineCost
from otkd.ot.options import Objective, SolverSettings
from otkd.precision import inner_products, without_autocast

# An accelerated step takes as long as so many plain ones of few samples, and of more samples as
# long as so many entries of the kernel take.
_PLAIN_STEPS, _PLAIN_ENTRIES = 18, 2**21
_LINE_FROM = 384  # samples: so few are faster with a matrix
# Distance of (q, 1 − q) and (p, 1 − p), in |q − p|.
_SLOPES = {"l1": 2.0, "euclidean": math.sqrt(2)}
_NARROW = 64  # points of so few coordinates are as fast compared one by one
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
    """Entropic transport between the b student and the b teacher samples of a batch.

    Sample i is the point q_i = softmax(student_logits_i / T) with mass 1/b; the cost between two
    points is their distance. Gradients flow through the costs.

    Args:
        student_logits: ``(*batch, b, vocab)``.
        teacher_logits: ``(*batch, b, vocab)``, a constant.
        temperature: divides both logits.
        teacher_temperature: divides the teacher's logits instead, where given.
        cost: ``"l1"``, ``"euclidean"`` or ``"sqeuclidean"`` distance of the distributions.
        sample_cost: what it costs, on top, to move mass from one sample to another.
        epsilon: entropic strength, in units of the cost.
        debias: subtract half the transport of each side to itself, so that the distance is 0 where
            the two sides agree.
        value: ``"dual"`` or ``"sharp"``; see :func:`otkd.ot.sinkhorn_divergence`.
        max_iterations: limit of the solver.
        tolerance: L1 marginal error at which a batch is solved.

    Raises:
        TypeError, ValueError: for input that does not fit, parameters out of range, NaN.

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
    objective = Objective(epsilon=epsilon, value=value, debias=debias)
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

    With ``normalize`` all distances are divided by the mean between the two sides, a constant;
    without, the points are distributions. Then ``sample_cost`` is added wherever mass would leave
    its sample.
    """
    check_choice("cost", cost, BATCH_COSTS)
    check_not_negative(sample_cost=sample_cost)
    pairs = [(x, y), (x, x), (y, y)] if objective.debias else [(x, y)]
    if not (normalize or sample_cost) and _on_a_line(x, cost, objective):
        lines = [LineCost(s[:, 0], t[:, 0], _SLOPES[cost]) for s, t in pairs]
        costs = [cast(Tensor, line) for line in lines]  # a lazy cost stands where a matrix may
    else:
        with without_autocast(x):
            costs = [point_distances(s, t, cost) for s, t in pairs]
            if normalize:
                mean = costs[0].detach().mean((-2, -1), keepdim=True)
                # Where all points are one there is nothing to divide by, nor to transport.
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
    """Whether the points are many distributions over two classes, of which one says all."""
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
        # By products small distances drown in rounding, and their gradients with them.
        direct = x.shape[-1] <= _NARROW
        mode = "donot_use_mm_for_euclid_dist" if direct else "use_mm_for_euclid_dist_if_necessary"
        return cdist(x, y, compute_mode=mode)
    # What all points share adds nothing to a distance, but would drown it in rounding: states of
    # transformers have a few large entries that hardly vary.
    centre = y.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * inner_products(x, y)).clamp(min=0)
