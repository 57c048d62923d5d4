"""What a cost may have without a change: a constant, a unit, an order.

Costs are multiples of a power of two, and so are constants and units: the tensors that are compared
hold the same problem to the last bit, and what is found has to be the same to rounding.
"""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import otkd
from otkd import ot
from otkd.costs import CostMatrices
from otkd.ot.divergence import solve_divergence
from otkd.ot.kernels.blocked import BlockedCost
from tests import naive
from tests.problems import centred, generator, masses, objective_and_solver, points

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
F32, F64 = torch.float32, torch.float64
EPS = {F32: 2.0**-23, F64: 2.0**-52}

seeds = st.integers(0, 2**20)
dtypes = st.sampled_from([F32, F64])
reaches = st.sampled_from([1e-6, 1e-2, 0.2, 1.0, 20.0, 70.0, 200.0, 340.0, 700.0, 1e4])
"""(max − min)/ε: every kernel, and where each ends."""
constants = st.sampled_from([9.0, -9.0, 1024.0, -1024.0])
units = st.sampled_from([2.0**-100, 2.0**-20, 2.0**20, 2.0**100])
problems = st.sampled_from(["shared", "one", "per_item", "mixed"])


def steps(seed: int, *shape: int) -> torch.Tensor:
    """Multiples of 1/8 between −8 and 8, in which float32 has room for the constants."""
    return torch.randint(-64, 65, shape, generator=generator(seed)).double() / 8


def problem(kind: str, seed: int, dtype: torch.dtype, reach: float, *, square: bool = False):
    """a, b, cost and ε, with the costs of ``mixed`` some wide and some narrow; peaked masses."""
    n = 2 + seed % 4
    m = n if square else 2 + seed // 4 % 5
    batch = 1 if kind == "one" else 3
    shape = (batch, n, m) if kind in ("per_item", "mixed") else (n, m)
    cost = steps(seed + 2, *shape)
    if kind == "mixed":
        cost = cost / torch.tensor([1.0, 8.0, 2.0**-4]).double().reshape(-1, 1, 1)
    spread = (0.3, 3.0, 12.0)[seed % 3]
    a, b = masses(seed, batch, n, spread=spread), masses(seed + 1, batch, m, spread=spread)
    if seed % 5 == 0:
        a[:, 0] = 0
        a = a / a.sum(-1, keepdim=True)
    if square:
        cost = (cost - cost.mT).abs()
    width = (cost.amax((-2, -1)) - cost.amin((-2, -1))).max().item() or 1.0
    return a.to(dtype), b.to(dtype), cost.to(dtype), width / reach


def sinkhorn(a, b, cost, epsilon, **options):
    """The solution with the gradients of its value in a, b and the cost."""
    leaves = [x.detach().clone().requires_grad_() for x in (a, b, cost)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otkd.ConvergenceWarning)  # asked for
        solution = ot.sinkhorn(*leaves, epsilon=epsilon, **options)
    return solution, torch.autograd.grad(solution.value.sum(), leaves)


def divergence(a, b, costs, options):
    """The solution of a divergence with its gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (a, b, *costs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otkd.ConvergenceWarning)
        solution = solve_divergence(leaves[0], leaves[1], CostMatrices(*leaves[2:]), *options)
        gradients = torch.autograd.grad(solution.value.sum(), leaves, allow_unused=True)
    return solution, [gradient for gradient in gradients if gradient is not None]


def same_convergence(found, expected):
    assert found.converged == expected.converged
    assert found.iterations == expected.iterations
    close(found.marginal_error, expected.marginal_error, rtol=1e-4, atol=0)


# Balanced transport ------------------------------------------------------------------------------


@settings(max_examples=60)
@given(problems, seeds, dtypes, reaches, constants)
def test_a_constant_is_added_to_the_value_and_to_nothing_else(kind, seed, dtype, reach, constant):
    a, b, cost, epsilon = problem(kind, seed, dtype, reach)
    expected, slopes = sinkhorn(a, b, cost, epsilon)
    found, found_slopes = sinkhorn(a, b, cost + constant, epsilon)
    same_convergence(found, expected)
    rounding = 4 * EPS[dtype] * (abs(constant) + 8)
    close(found.value, expected.value + constant, rtol=0, atol=rounding)
    close(found.transport_cost, expected.transport_cost + constant, rtol=0, atol=rounding)
    close(found.f, expected.f + constant / 2, rtol=0, atol=rounding)
    close(found.g, expected.g + constant / 2, rtol=0, atol=rounding)
    close(found.plan(), expected.plan(), rtol=0, atol=0)
    close(found_slopes[2], slopes[2], rtol=0, atol=0)
    for left, right in zip(found_slopes[:2], slopes[:2], strict=True):
        close(centred(left), centred(right), rtol=0, atol=rounding)


@settings(max_examples=60)
@given(problems, seeds, dtypes, reaches, units)
def test_the_unit_of_cost_and_epsilon_is_that_of_the_value(kind, seed, dtype, reach, unit):
    a, b, cost, epsilon = problem(kind, seed, dtype, reach)
    expected, slopes = sinkhorn(a, b, cost, epsilon)
    found, found_slopes = sinkhorn(a, b, cost * unit, epsilon * unit)
    same_convergence(found, expected)
    rounding = 64 * EPS[dtype] * 16
    for name in ("value", "transport_cost", "f", "g"):
        close(getattr(found, name) / unit, getattr(expected, name), rtol=0, atol=rounding)
    exact = 64 * EPS[dtype] * max(1.0, reach)
    close(found.plan(), expected.plan(), rtol=0, atol=exact)
    close(found_slopes[2], slopes[2], rtol=0, atol=3 * exact)  # of all problems of a batch
    for left, right in zip(found_slopes[:2], slopes[:2], strict=True):
        close(left / unit, right, rtol=0, atol=rounding)


@settings(max_examples=40)
@given(problems, seeds, dtypes, reaches)
def test_the_order_of_points_and_problems_says_nothing(kind, seed, dtype, reach):
    a, b, cost, epsilon = problem(kind, seed, dtype, reach)
    rows, columns, batch = (
        torch.randperm(size, generator=generator(seed)) for size in (*cost.shape[-2:], len(a))
    )
    expected, _ = sinkhorn(a, b, cost, epsilon)
    moved = cost[..., rows, :][..., columns]
    moved = moved[batch] if cost.ndim == 3 else moved
    found, _ = sinkhorn(a[batch][:, rows], b[batch][:, columns], moved, epsilon)
    assert found.converged == expected.converged
    solved = (found.marginal_error <= 1e-4) & (expected.marginal_error[batch] <= 1e-4)
    # Each is within the tolerance of the optimum; potentials are known up to ε times that.
    atol = 1e-3 * min(epsilon * 10, 8.0) + 64 * EPS[dtype] * 16
    close(found.value[solved], expected.value[batch][solved], rtol=0, atol=atol)
    if solved.all():
        plan = expected.plan()[batch][:, rows][..., columns]
        close(found.plan(), plan, rtol=0, atol=4e-4 + 64 * EPS[dtype] * reach)
        turned, _ = sinkhorn(b, a, cost.mT, epsilon)
        if turned.converged:
            close(turned.value, expected.value, rtol=0, atol=atol)


@settings(max_examples=60)
@given(problems, seeds, dtypes, reaches, constants)
def test_it_is_solved_at_any_range_over_epsilon(kind, seed, dtype, reach, constant):
    """The plan of the potentials has both marginals, by sums in float64 that know of no kernel."""
    a, b, cost, epsilon = problem(kind, seed, dtype, reach)
    found, _ = sinkhorn(a, b, cost + constant, epsilon)
    assert found.converged
    f, g, a, b = (x.double() for x in (found.f, found.g, a, b))
    plan = naive.plan(f - constant / 2, g - constant / 2, a, b, cost.double(), epsilon)
    rounding = 64 * EPS[dtype] * reach * (1 + abs(constant) / 16)
    assert (plan.sum(-1) - a).abs().sum(-1).max() <= 1.01e-4 + rounding
    assert (plan.sum(-2) - b).abs().sum(-1).max() <= 1.01e-4 + rounding


@given(seeds, dtypes, units, st.sampled_from(["dual", "sharp"]))
def test_a_tiny_range_has_a_value_and_gradient_as_precise(seed, dtype, unit, value):
    """To first order in C/ε the plan is a⊗b and f = C·b − ½·aᵀ·C·b; float32 has six digits."""
    a, b, cost, _ = problem("shared", seed, dtype, 1.0)
    a, b, cost = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True), cost * unit
    options = objective_and_solver(epsilon=2.0**24 * unit, value=value, debias=False)
    solution, slopes = divergence(a, b, [cost], options)
    assert solution.converged
    independent = torch.einsum("bi,ij,bj->b", *(x.double() for x in (a, cost, b)))
    close(solution.value.double() / unit, independent / unit, rtol=0, atol=2e-5)
    expected = b.double() @ cost.double().mT - independent.unsqueeze(-1) / 2
    close(slopes[0].double() / unit, expected / unit, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("epsilon", [1e-300, 1e-40, 1e30])
def test_an_extreme_epsilon_is_finite_and_honest(dtype, epsilon):
    a, b, cost, _ = problem("per_item", 7, dtype, 1.0)
    solution, slopes = sinkhorn(a, b, cost, epsilon, max_iterations=50)
    for values in (solution.value, solution.f, solution.g, *slopes):
        assert values.isfinite().all()
    assert solution.converged == bool((solution.marginal_error <= 1e-4).all())


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_range_of_one_problem_does_not_change_another(dtype):
    a, b, cost, _ = problem("mixed", 4, dtype, 1.0)
    for epsilon in (0.01, 0.05, 1.0):
        together, slopes = sinkhorn(a, b, cost, epsilon)
        for i in range(len(a)):
            rows = slice(i, i + 1)
            alone, own = sinkhorn(a[rows], b[rows], cost[rows], epsilon)
            assert alone.converged
            close(alone.value, together.value[rows], rtol=0, atol=1e-4 * epsilon * 10 + 1e-6)
            close(own[2], slopes[2][rows], rtol=0, atol=1e-3)


# The divergence ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.sampled_from(["shared", "per_item"]),
    seeds,
    dtypes,
    st.sampled_from([0.2, 20.0, 70.0, 400.0]),
    constants,
    st.sampled_from(["dual", "sharp"]),
    st.booleans(),
)
def test_a_constant_in_all_costs_leaves_the_divergence(
    kind, seed, dtype, reach, constant, value, debias
):
    """And one in each of the three adds up; gradients change by constants of a distribution."""
    a, b, cost, epsilon = problem(kind, seed, dtype, reach, square=True)
    options = objective_and_solver(epsilon=epsilon, max_iterations=300, value=value, debias=debias)
    expected, slopes = divergence(a, b, [cost] * 3, options)
    found, found_slopes = divergence(a, b, [cost + constant] * 3, options)
    assert (found.converged, found.iterations) == (expected.converged, expected.iterations)
    rounding = 0.0 if debias else 4 * EPS[dtype] * (abs(constant) + 16)
    close(found.value, expected.value + (0 if debias else constant), rtol=0, atol=rounding)
    for left, right in zip(found_slopes[:2], slopes[:2], strict=True):
        close(centred(left), centred(right), rtol=0, atol=rounding)
    for left, right in zip(found_slopes[2:], slopes[2:], strict=True):
        close(left, right, rtol=0, atol=0)
    if debias:
        apart = [cost + constant, cost - constant, cost + 2 * constant]
        found, found_slopes = divergence(a, b, apart, options)
        rounding = 4 * EPS[dtype] * (abs(constant) + 16)
        close(found.value, expected.value + constant / 2, rtol=0, atol=rounding)
        close(found_slopes[2], slopes[2], rtol=0, atol=0)


@given(
    seeds,
    dtypes,
    st.sampled_from([0.2, 20.0, 70.0, 400.0]),
    units,
    st.sampled_from(["dual", "sharp"]),
)
def test_the_unit_of_a_divergence(seed, dtype, reach, unit, value):
    a, b, cost, epsilon = problem("shared", seed, dtype, reach, square=True)
    limits = {"max_iterations": 300, "value": value}
    expected, slopes = divergence(a, b, [cost] * 3, objective_and_solver(epsilon=epsilon, **limits))
    found, found_slopes = divergence(
        a, b, [cost * unit] * 3, objective_and_solver(epsilon=epsilon * unit, **limits)
    )
    assert (found.converged, found.iterations) == (expected.converged, expected.iterations)
    rounding = 256 * EPS[dtype] * 16
    close(found.value / unit, expected.value, rtol=0, atol=rounding)
    for left, right in zip(found_slopes[:2], slopes[:2], strict=True):
        close(left / unit, right, rtol=0, atol=rounding * (1 if value == "dual" else reach))


# Penalised marginals -----------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    problems,
    seeds,
    st.sampled_from([0.2, 20.0, 400.0]),
    st.sampled_from([(1.0, 1.0), (0.5, 20.0), (2.0, math.inf), (math.inf, 0.5)]),
    st.sampled_from([1.0, -1.0, 3.0]),
    st.sampled_from([(1.0, 1.0), (1e-3, 50.0), (1e12, 1e15)]),
)
def test_constants_and_masses_of_penalised_transport(kind, seed, reach, rho, constant, totals):
    """They scale the plan as the closed form says.

    A cost that is larger by c has the plan exp(−c/(ε + ρ_a + ρ_b)) times: all of it where neither
    side is held, and none where one is.
    """
    a, b, cost, epsilon = problem(kind, seed, F64, reach)
    # Masses decide which error is small enough, so only solutions to the end are the same.
    tight = {"tolerance": 1e-9, "max_iterations": 10_000}
    options = objective_and_solver(epsilon=epsilon, marginal_relaxation=rho, debias=None, **tight)
    expected, slopes = divergence(a, b, [cost], options)
    assert expected.converged
    moved, moved_slopes = divergence(a * totals[0], b * totals[1], [cost + constant], options)
    assert moved.converged
    share = [1 / (epsilon + sum(rho)), epsilon + rho[0], epsilon + rho[1]]
    log_a, log_b = (math.log(total) for total in totals)
    if math.isinf(rho[0]):
        log_factor = log_a
    elif math.isinf(rho[1]):
        log_factor = log_b
    else:
        log_factor = share[0] * (share[1] * log_a + share[2] * log_b - constant)
    factor = math.exp(log_factor)
    close(moved_slopes[2] / factor, slopes[2], rtol=1e-6, atol=1e-8)
    if totals == (1.0, 1.0) and math.inf in rho:
        close(moved.value, expected.value + constant, rtol=1e-10, atol=1e-10)


@given(seeds, dtypes, st.sampled_from([0.2, 20.0, 70.0]), units)
def test_the_unit_of_cost_epsilon_and_penalty(seed, dtype, reach, unit):
    a, b, cost, epsilon = problem("per_item", seed, dtype, reach)
    cost = cost + 8  # below 0 by many ρ the plan is as many times larger than the masses
    for rho in ((2.0, 0.5), (2.0, math.inf), (0.01, 0.01)):
        options = objective_and_solver(epsilon=epsilon, marginal_relaxation=rho, debias=False)
        expected, slopes = divergence(a, b, [cost], options)
        scaled = tuple(unit * penalty for penalty in rho)
        options = objective_and_solver(
            epsilon=epsilon * unit, marginal_relaxation=scaled, debias=False
        )
        found, found_slopes = divergence(a, b, [cost * unit], options)
        assert found.iterations == expected.iterations
        rounding = 256 * EPS[dtype] * 16
        close(found.value / unit, expected.value, rtol=1e-5, atol=rounding)
        close(found_slopes[0] / unit, slopes[0], rtol=1e-5, atol=rounding)
        close(found_slopes[2], slopes[2], rtol=1e-4, atol=64 * EPS[dtype] * max(1.0, reach))


@pytest.mark.parametrize("rho", [(0.5, 0.5), (0.2, 3.0), (2.0, 0.1)])
@pytest.mark.parametrize("reach", [0.2, 20.0, 70.0])
def test_plans_near_the_largest_of_float32_have_the_gradients_of_float64(rho, reach):
    """Costs so far below 0 that the plan has a mass of about 1e35, and its density as much."""
    a, b, cost, epsilon = problem("per_item", 8, F64, reach)
    cost, epsilon = cost / 32, epsilon / 32
    cost = cost - 78 * (epsilon + sum(rho))
    options = objective_and_solver(epsilon=epsilon, marginal_relaxation=rho, debias=False)
    expected, slopes = divergence(a, b, [cost], options)
    found, found_slopes = divergence(a.float(), b.float(), [cost.float()], options)
    assert found.converged
    close(found.value.double(), expected.value, rtol=2e-3, atol=0)
    for left, right in zip(found_slopes, slopes, strict=True):
        assert left.isfinite().all()
        close(left.double(), right, rtol=1e-2, atol=1e-3 * right.abs().max().item())
    assert slopes[2].sum() > 1e33


# Exact transport ---------------------------------------------------------------------------------


def wasserstein(a, b, cost):
    leaves = [x.detach().clone().requires_grad_() for x in (a, b, cost)]
    value = ot.wasserstein(*leaves)
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


@settings(max_examples=40)
@given(st.sampled_from(["shared", "one", "per_item"]), seeds, dtypes, constants, st.one_of(units))
def test_exact_transport_of_signed_costs(kind, seed, dtype, constant, unit):
    pytest.importorskip("ot")
    a, b, cost, _ = problem(kind, seed, dtype, 1.0)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    value, slopes = wasserstein(a, b, cost)
    rounding = 4 * EPS[dtype] * (abs(constant) + 16)
    found, found_slopes = wasserstein(a, b, cost + constant)
    close(found, value + constant, rtol=0, atol=rounding)
    close(found_slopes[2], slopes[2], rtol=0, atol=EPS[dtype])
    found, found_slopes = wasserstein(a, b, cost * unit)
    close(found / unit, value, rtol=0, atol=rounding)
    close(found_slopes[2], slopes[2], rtol=0, atol=EPS[dtype])
    # No plan is better than the exact one, and an entropic one is not much worse.
    width = (cost.amax((-2, -1)) - cost.amin((-2, -1))).max().item() or 1.0
    entropic, _ = sinkhorn(a.double(), b.double(), cost.double(), width / 300, tolerance=1e-9)
    gap = entropic.transport_cost - value.double()
    assert (gap >= -rounding - 1e-7).all()
    assert (gap <= width / 300 * math.log(cost.shape[-1] * cost.shape[-2]) + rounding).all()


# Costs that are never a matrix -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("epsilon", [1e-2, 0.1, 1e6])
def test_a_blocked_cost_is_its_matrix_at_every_epsilon(dtype, epsilon):
    x = points(1, 12, 3).to(dtype)
    cost = BlockedCost(otkd.costs.EmbeddingCost(x), dtype=dtype)
    matrix = torch.cat([block for _, block in cost.blocks()])
    a, b = masses(2, 3, 12).to(dtype), masses(3, 3, 12).to(dtype)
    options = objective_and_solver(epsilon=epsilon, max_iterations=2000, debias=True)
    lazy = solve_divergence(a, b, CostMatrices(cost, cost, cost), *options)
    dense = solve_divergence(a, b, CostMatrices(matrix, matrix, matrix), *options)
    assert dense.converged
    assert lazy.converged
    close(lazy.value, dense.value, rtol=1e-4, atol=2e-4 * min(epsilon, 1.0))
