"""Anderson's acceleration: the same solution in fewer iterations, for every problem of a batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otkd import ot
from otkd.costs import CostMatrices
from otkd.ot.acceleration import Anderson
from otkd.ot.divergence import solve_divergence
from otkd.ot.problem import Problem
from otkd.ot.solver import solve_potentials
from tests import naive
from tests.problems import KINDS, masses, objective_and_solver, points, problem, seeds, self_costs

pytestmark = pytest.mark.usefixtures("seeded", "iterations_alone")
close = torch.testing.assert_close
F64 = torch.float64


def solve(
    a, b, cost, epsilon, *, tolerance=1e-8, steps=5000, symmetric=False, penalty=math.inf, plain=0
):
    fixed = Problem(a, b, cost, epsilon, symmetric, (penalty, penalty))
    limits = {"tolerance": tolerance, "max_iterations": steps, "plain_steps": plain}
    return solve_potentials(fixed, fixed.kernel(), **limits)


def plain_errors(a, b, cost, epsilon, steps):
    """L1 marginal error of every iteration of Sinkhorn's own, ``(steps, B)``, and its plan."""
    f, errors = naive.soft_minimum(torch.zeros_like(b), b, cost, epsilon), []
    for _ in range(steps):
        g = naive.soft_minimum(f, a, cost.mT, epsilon)
        plan = naive.plan(f, g, a, b, cost, epsilon)
        errors.append((plan.sum(-1) - a).abs().sum(-1))
        if errors[-1].max() < 1e-13:
            break
        f = naive.soft_minimum(g, b, cost, epsilon)
    return torch.stack(errors), plan


def first_below(errors, tolerance):
    """The iteration, from 1, at which each problem was solved."""
    return [int((column <= tolerance).nonzero()[0]) + 1 for column in errors.T]


def clusters(seed: int, n: int = 12, count: int = 3, spread: float = 0.1):
    """Tokens that lie together in a few clusters, with a batch of masses on them."""
    places = points(seed, count, 8)[torch.arange(n) % count] + spread * points(seed + 1, n, 8)
    cost = (places[:, None] - places).square().sum(-1)
    a, b = (masses(seed + k, 3, n, spread=2.0) for k in (2, 3))
    return a, b, cost / cost.mean()


def plan_of(found, a, b, cost, epsilon):
    return naive.plan(found.f, found.g, a, b, cost, epsilon)


# The same solution -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_the_solution_is_that_of_long_plain_iterations(kind, epsilon):
    a, b, cost = problem(kind)
    errors, plan = plain_errors(a, b, cost, epsilon, 4000)
    assert errors[-1].max() < 1e-11
    found = solve(a, b, cost, epsilon, tolerance=1e-11)
    assert found.converged
    close(plan_of(found, a, b, cost, epsilon), plan, atol=1e-10, rtol=0)


@pytest.mark.parametrize("penalty", [math.inf, 0.5])
def test_the_symmetric_solution_is_that_of_long_plain_iterations(penalty):
    a, cost = masses(1, 3, 8, spread=2.0), self_costs(1, 8)["sqeuclidean"]
    found = solve(a, a, cost, 0.05, tolerance=1e-12, symmetric=True, penalty=penalty)
    assert found.converged
    assert found.f.equal(found.g)
    damping = 1 / (1 + 0.05 / penalty)
    f = torch.zeros_like(a)
    for _ in range(3000):
        f = (f + damping * naive.soft_minimum(f, a, cost, 0.05)) / 2
    close(found.f, f, atol=1e-9, rtol=0)


@pytest.mark.parametrize("penalty", [0.1, 5.0])
def test_the_unbalanced_solution_is_that_of_long_plain_iterations(penalty):
    a, b, cost = problem("shared")
    a, b, damping = 0.5 * a, 1.5 * b, penalty / (penalty + 0.1)
    found = solve(a, b, cost, 0.1, tolerance=1e-12, penalty=penalty)
    assert found.converged
    g = torch.zeros_like(b)
    for _ in range(3000):
        f = damping * naive.soft_minimum(g, b, cost, 0.1)
        g = damping * naive.soft_minimum(f, a, cost.mT, 0.1)
    close(found.f, f, atol=1e-9, rtol=0)
    close(found.g, g, atol=1e-9, rtol=0)


def test_the_accelerated_adjoint_has_the_gradient_of_unrolled_iterations():
    a, b, cost = clusters(1, n=8)
    options = objective_and_solver(
        epsilon=0.15, tolerance=1e-11, max_iterations=5000, value="sharp", debias=False
    )
    leaves = [x.clone().requires_grad_() for x in (a, cost)]
    solution = solve_divergence(leaves[0], b, CostMatrices(leaves[1]), *options)
    gradient = torch.autograd.grad(solution.value.sum(), leaves)
    _, plan = naive.sinkhorn(leaves[0], b, leaves[1], 0.15, iterations=1500)
    expected = torch.autograd.grad((plan * leaves[1]).sum(), leaves)
    shifts = gradient[0] - expected[0]  # free up to a constant of each distribution
    close(shifts, shifts.mean(-1, keepdim=True).expand_as(shifts), atol=1e-7, rtol=0)
    close(gradient[1], expected[1], atol=1e-7, rtol=1e-6)


# Fewer iterations --------------------------------------------------------------------------------


def test_between_clusters_it_takes_a_third_of_the_iterations():
    taken, plain = 0, 0
    for seed in range(0, 60, 10):
        a, b, cost = clusters(seed)
        errors, _ = plain_errors(a, b, cost, 0.2, 3000)
        plain += max(first_below(errors, 1e-6))
        found = solve(a, b, cost, 0.2, tolerance=1e-6)
        assert found.converged
        taken += found.iterations
    assert taken <= plain / 3, (taken, plain)


@given(seeds, st.sampled_from(KINDS), st.sampled_from([0.05, 0.1, 0.5]))
def test_no_problem_takes_many_more_than_without(seed, kind, epsilon):
    """Where combinations lead astray they are tried less and less often."""
    a, b, cost = problem(kind, seed, batch=2, n=4)
    errors, _ = plain_errors(a, b, cost, epsilon, 6000)
    for i, plain in enumerate(first_below(errors, 1e-6)):
        one = slice(i, i + 1)
        matrix = cost[one] if cost.ndim == 3 else cost
        found = solve(a[one], b[one], matrix, epsilon, tolerance=1e-6, steps=3 * plain + 10)
        assert found.converged


@given(seeds, st.sampled_from(KINDS), st.sampled_from([0.01, 0.1]), st.integers(1, 60))
def test_the_last_iteration_is_as_good_as_the_best(seed, kind, epsilon, steps):
    """The error of Sinkhorn's own step never grows: its image of the best point is as good."""
    a, b, cost = problem(kind, seed, batch=2, n=4)

    def step(f):
        g = naive.soft_minimum(f, a, cost.mT, epsilon)
        image = naive.soft_minimum(g, b, cost, epsilon)
        return image, (naive.plan(f, g, a, b, cost, epsilon).sum(-1) - a).abs().sum(-1)

    f = naive.soft_minimum(torch.zeros_like(b), b, cost, epsilon)
    accelerator, best = Anderson(a, f), torch.full((2,), torch.inf, dtype=F64)
    for _ in range(steps):
        image, error = step(f)
        best = torch.minimum(best, error)
        f = accelerator.next_point(f, image, error)
        assert f.isfinite().all()
    assert (step(accelerator.best_image)[1] <= 1.002 * best + 1e-12).all()


@given(
    seeds,
    st.sampled_from(KINDS),
    st.sampled_from([0.003, 0.02, 0.1]),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_stopped_early_it_reports_the_error_it_has(seed, kind, epsilon, steps, plain):
    a, b, cost = problem(kind, seed, batch=3, n=4)
    found = solve(a, b, cost, epsilon, tolerance=1e-6, steps=steps, plain=plain)
    assert found.iterations <= steps
    plan = plan_of(found, a, b, cost, epsilon)
    error = (plan.sum(-1) - a).abs().sum(-1)
    close(found.marginal_error, error, rtol=1e-6, atol=1e-9)
    close(plan.sum(-2), b, rtol=1e-9, atol=1e-12)
    assert found.converged == bool((error <= 1e-6).all())
    first, _ = plain_errors(a, b, cost, epsilon, 1)
    assert (error <= 1.001 * first[0] + 1e-9).all()


# Plain steps between accelerated ones ----------------------------------------------------------


@given(seeds, st.sampled_from(KINDS), st.floats(0.1, 1.0), st.integers(1, 7))
def test_plain_steps_are_sinkhorns_own(seed, kind, epsilon, count):
    a, b, cost = problem(kind, seed, batch=3, n=5)
    kernel = Problem(a, b, cost, epsilon).kernel()
    assert kernel.scales
    f = expected = points(seed + 1, 3, a.shape[-1])
    for _ in range(count):
        g = naive.soft_minimum(expected, a, cost.mT, epsilon)
        expected = naive.soft_minimum(g, b, cost, epsilon)
    close(kernel.alternate(f, a.log(), b.log(), count)[0], expected, rtol=1e-9, atol=1e-11)


@given(seeds, st.sampled_from(KINDS), st.floats(0.1, 1.0), st.sampled_from([1e-1, 1e-3, 1e-6]))
def test_plain_steps_end_where_all_problems_are_solved(seed, kind, epsilon, tolerance):
    a, b, cost = problem(kind, seed, batch=3, n=5)
    kernel, f = Problem(a, b, cost, epsilon).kernel(), torch.zeros_like(a)
    found, made = kernel.alternate(f, a.log(), b.log(), 400, tolerance)
    close(found, kernel.alternate(f, a.log(), b.log(), made)[0], rtol=1e-12, atol=1e-12)

    def error(steps):
        before = kernel.alternate(f, a.log(), b.log(), steps)[0]
        g = naive.soft_minimum(before, a, cost.mT, epsilon)
        return (naive.plan(before, g, a, b, cost, epsilon).sum(-1) - a).abs().sum(-1).max()

    assert made == 400 or (made % 8 == 0 and error(made - 1) <= 1.001 * tolerance + 1e-12)
    assert made <= 8 or error(made - 9) > 0.999 * tolerance


@given(seeds, st.floats(0.1, 1.0), st.integers(1, 7))
def test_plain_symmetric_steps_go_halfway(seed, epsilon, count):
    a, cost = masses(seed, 3, 5), self_costs(seed, 5)["l1"]
    kernel = Problem(a, a, cost, epsilon, symmetric=True).kernel()
    f = expected = points(seed + 1, 3, 5)
    for _ in range(count):
        expected = (expected + naive.soft_minimum(expected, a, cost, epsilon)) / 2
    close(kernel.average(f, a.log(), count), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plain", [1, 8])
def test_with_plain_steps_the_solution_is_the_same(kind, plain):
    a, b, cost = problem(kind, 4, batch=3)
    expected = solve(a, b, cost, 0.1, tolerance=1e-10)
    found = solve(a, b, cost, 0.1, tolerance=1e-10, plain=plain)
    assert found.converged
    close(plan_of(found, a, b, cost, 0.1), plan_of(expected, a, b, cost, 0.1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_plain_steps_from_a_point_led_astray_are_finite(dtype):
    """An extrapolation may go anywhere; the largest reach at which the kernel scales."""
    a, b, cost = (x.to(dtype) for x in problem("zero_masses", 1, batch=4))
    epsilon = cost.max().item() / (29 if dtype == torch.float32 else 149)
    kernel = Problem(a, b, cost, epsilon).kernel()
    assert kernel.scales
    astray = 1e4 * points(2, 4, a.shape[-1]).to(dtype)
    assert kernel.alternate(astray, a.log(), b.log(), 3)[0].isfinite().all()
    square = Problem(a, a, cost, epsilon, symmetric=True).kernel()
    assert square.average(astray, a.log(), 3).isfinite().all()


def test_beyond_that_reach_there_are_no_plain_steps():
    a, b, cost = problem("shared", 3, batch=2)
    epsilon = cost.max().item() / 200
    assert not Problem(a, b, cost, epsilon).kernel().scales
    alone, with_plain = (solve(a, b, cost, epsilon, plain=plain) for plain in (0, 8))
    assert alone.iterations == with_plain.iterations


# A batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        *((kind, "balanced") for kind in KINDS),
        *((kind, "marginal_relaxation") for kind in KINDS),
        *((kind, "symmetric") for kind in KINDS if kind != "rectangular"),
    ],
)
def test_every_problem_of_a_batch_is_solved_as_it_is_alone(kind, variant):
    """Easy and hard ones in turn, which leave the batch at different times."""
    a, b, cost = problem(kind, 5, batch=9)
    order = torch.tensor([8, 1, 6, 3, 4, 5, 2, 7, 0])
    flat_a, flat_b = torch.full_like(a, 1 / a.shape[-1]), torch.full_like(b, 1 / b.shape[-1])
    ease = (torch.arange(9, dtype=F64)[order] / 8).unsqueeze(-1) ** 0.2  # 1: both sides flat
    a, b = ease * flat_a + (1 - ease) * a, ease * flat_b + (1 - ease) * b
    options = {"tolerance": 1e-10, "penalty": 0.5 if variant == "marginal_relaxation" else math.inf}
    if variant == "symmetric":
        cost = cost + cost.mT
        cost.diagonal(dim1=-2, dim2=-1).zero_()
        b, options["symmetric"] = a, True
    found = solve(a, b, cost, 0.1, **options)
    assert found.converged
    together = plan_of(found, a, b, cost, 0.1)
    iterations = set()
    for i in range(9):
        one = slice(i, i + 1)
        matrix = cost[one] if cost.ndim == 3 else cost
        alone = solve(a[one], b[one], matrix, 0.1, **options)
        assert alone.converged
        iterations.add(alone.iterations)
        close(plan_of(alone, a[one], b[one], matrix, 0.1), together[one], atol=1e-8, rtol=0)
        close(alone.marginal_error, found.marginal_error[one], atol=1e-10, rtol=0)
        close(alone.row_excess * a[one], found.row_excess[one] * a[one], atol=1e-9, rtol=0)
    assert len(iterations) > 1


def test_a_hard_problem_does_not_change_the_others():
    a, b, cost = problem("per_item", 3, batch=6)
    easy = solve(a, b, cost, 0.3, tolerance=1e-9)
    hard = cost.clone()
    hard[2] *= 40  # as if at a fortieth of the ε
    found = solve(a, b, hard, 0.3, tolerance=1e-9, steps=60)
    assert not found.converged
    assert found.iterations == 60
    assert found.marginal_error[2] > 1e-9
    others = torch.tensor([0, 1, 3, 4, 5])
    assert found.marginal_error[others].max() <= 1e-9
    close(
        plan_of(found, a, b, hard, 0.3)[others],
        plan_of(easy, a, b, cost, 0.3)[others],
        atol=1e-8,
        rtol=0,
    )


def test_a_batch_without_problems():
    a = torch.zeros(0, 4, dtype=F64)
    found = solve(a, a[:, :3], torch.rand(4, 3, dtype=F64), 0.1)
    assert found.converged
    assert found.f.shape == (0, 4)
    assert found.g.shape == (0, 3)


# Hard cases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("reach", [20, 30, 40])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_points_far_apart(dtype, reach, n):
    cost = self_costs(4, n)["sqeuclidean"].to(dtype)
    epsilon = (cost.max() / reach).item()
    a, b = (masses(seed, 16, n, spread=3.0).to(dtype) for seed in (1, 2))
    tolerance = 1e-4
    found = solve(a, b, cost, epsilon, tolerance=tolerance, steps=1000)
    for values in (found.f, found.g, found.marginal_error):
        assert values.isfinite().all()
    exact = plan_of(found, *(x.double() for x in (a, b, cost)), epsilon)
    rows = (exact.sum(-1) - a).abs().sum(-1)
    columns = (exact.sum(-2) - b).abs().sum(-1)  # off by what rows of little mass had lacked
    slack = reach * (1e-5 if dtype == torch.float32 else 1e-12)
    error = found.marginal_error.double()
    assert (torch.maximum(rows, columns) <= 1.001 * error + slack).all()
    assert (error <= 1.001 * (rows + columns) + slack).all()
    assert found.converged == bool((found.marginal_error <= tolerance).all())
    assert found.converged


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 1e-2])
def test_a_small_epsilon_is_finite_and_honest(dtype, epsilon):
    a, b, cost = (x.to(dtype) for x in problem("zero_masses", 1, batch=4))
    found = solve(a, b, cost, epsilon, tolerance=1e-5, steps=50)
    for values in (found.f, found.g, found.row_excess, found.marginal_error):
        assert values.isfinite().all()
    assert found.converged == bool((found.marginal_error <= 1e-5).all())
    if epsilon < 1e-2:
        assert not found.converged
    assert found.marginal_error.max() <= 2 + 1e-3  # all the mass that can be amiss


def test_beyond_the_precision_of_float32_it_stops_at_what_can_be_had():
    a, b, cost = (x.float() for x in clusters(1))
    found = solve(a, b, cost, 0.2, tolerance=1e-9, steps=500)
    assert not found.converged
    assert found.iterations == 500
    assert found.marginal_error.max() < 1e-5
    exact = ot.sinkhorn(*(x.double() for x in clusters(1)), epsilon=0.2, tolerance=1e-11)
    close(plan_of(found, a, b, cost, 0.2).double(), exact.plan(), atol=1e-5, rtol=0)


def test_nan_does_not_spread_in_the_batch():
    """A problem that breaks is given up; the others are solved as if it were not there."""
    target, f = torch.tensor([1.0, -2, 1], dtype=F64), torch.zeros(2, 3, dtype=F64)
    accelerator = Anderson(torch.full((2, 3), 1 / 3, dtype=F64), f)
    slope = torch.tensor([0.9, 0.5, 0.7], dtype=F64)
    for step in range(25):
        image = target + slope * (f - target)
        error = (image - f).abs().sum(-1)
        if step == 6:
            image[1], error[1] = torch.nan, torch.nan
        f = accelerator.next_point(f, image, error)
        assert f.isfinite().all()
    close(f, target.expand(2, 3), atol=1e-9, rtol=0)


def test_what_else_is_in_the_batch_changes_nothing():
    """Even far from convergence, where other problems go on: microbatches add up."""
    a, b = masses(3, 7, 12, spread=3.0), masses(4, 7, 12, spread=0.3)
    x = points(5, 12)
    cost = torch.cdist(x, x).square()
    options = {"epsilon": 0.05 * cost.mean().item(), "tolerance": 1e-2}
    together = ot.sinkhorn(a, b, cost, **options)
    for place in range(len(a)):
        alone = ot.sinkhorn(a[place : place + 1], b[place : place + 1], cost, **options)
        assert alone.iterations <= together.iterations
        torch.testing.assert_close(alone.f[0], together.f[place], rtol=1e-7, atol=1e-8)
