import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import otkd.ot.gradients
from otkd import ConvergenceWarning, ot
from otkd.costs import CostMatrices
from otkd.ot.divergence import solve_divergence
from otkd.ot.kernels.base import LogKernel, ProductKernel
from otkd.ot.kernels.stabilised import StabilisedKernel
from otkd.ot.problem import Problem
from otkd.ot.solver import solve_potentials
from tests import naive
from tests.problems import (
    KINDS,
    SELF_COSTS,
    centred,
    check_solution,
    masses,
    objective_and_solver,
    points,
    problem,
    seeds,
    self_costs,
)

pytestmark = pytest.mark.usefixtures("seeded", "solver")
TIGHT = {"tolerance": 1e-11, "max_iterations": 20_000}
close = torch.testing.assert_close


@pytest.fixture(params=["newton", "iterations"])
def solver(request):
    """The laws hold for the solver of few targets and for the one of many."""
    if request.param == "iterations":
        request.getfixturevalue("iterations_alone")


def pot():
    return pytest.importorskip("ot")


# The solution ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 1.0])
def test_plan_and_value_are_those_of_pot(kind, epsilon):
    a, b, cost = problem(kind)
    solution = ot.sinkhorn(a, b, cost, epsilon=epsilon, **TIGHT)
    check_solution(solution, a, b, cost, epsilon, 1e-11)
    plan = torch.zeros_like(solution.plan())
    for i in range(len(a)):
        rows, columns = a[i].nonzero()[:, 0], b[i].nonzero()[:, 0]
        matrix = (cost[i] if cost.ndim == 3 else cost)[rows][:, columns]
        arguments = (a[i, rows].numpy(), b[i, columns].numpy(), matrix.numpy(), epsilon)
        block = pot().sinkhorn(
            *arguments, method="sinkhorn_log", stopThr=1e-12, numItermax=20_000, warn=False
        )
        plan[i, rows[:, None], columns] = torch.as_tensor(block)
    close(solution.plan(), plan, atol=1e-8, rtol=1e-6)
    close(solution.transport_cost, (plan * cost).sum((-2, -1)), atol=1e-8, rtol=1e-6)
    close(solution.value, naive.objective(plan, a, b, cost, epsilon), atol=1e-8, rtol=1e-6)


@given(seeds, st.sampled_from(KINDS), st.sampled_from([0.003, 0.05, 0.5]))
def test_every_field_of_a_solution(seed, kind, epsilon):
    a, b, cost = problem(kind, seed, batch=2, n=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # small ε may not
        solution = ot.sinkhorn(a, b, cost, epsilon=epsilon, tolerance=1e-8, max_iterations=500)
    check_solution(solution, a, b, cost, epsilon, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    a, b, cost = (x.to(dtype) for x in problem("zero_masses", n=4))
    a, b = (x.double() / x.double().sum(-1, keepdim=True) for x in (a, b))
    solution = ot.sinkhorn(a.float(), b.float(), cost, epsilon=0.1)
    assert solution.value.dtype == torch.float32
    exact = ot.sinkhorn(a, b, cost.double(), epsilon=0.1, **TIGHT)
    close(solution.value.double(), exact.value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("epsilon", [0.0017, 0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masses_of_zero_leave_everything_finite(epsilon, dtype):
    """In both domains: exp((f + g − C)/ε) has no bound between two points without mass."""
    a = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]], dtype=dtype)
    cost = torch.tensor([[0.0, 4, 10], [4, 0, 6], [10, 6, 0]], dtype=dtype, requires_grad=True)
    solution = ot.sinkhorn(a, a.flip(0), cost, epsilon=epsilon)
    close(solution.value, torch.tensor([2.0, 2.0], dtype=dtype), atol=1e-4, rtol=1e-4)
    for values in (solution.transport_cost, solution.f, solution.g, solution.plan()):
        assert values.isfinite().all()
    for value in ("dual", "sharp"):
        logits = a.log().requires_grad_()
        b = a.flip(0)
        divergence = ot.sinkhorn_divergence(
            logits.softmax(-1), b, cost, epsilon=epsilon, value=value
        )
        gradients = torch.autograd.grad(divergence.sum(), (logits, cost))
        assert divergence.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_products_where_they_are_representable_and_other_kernels_elsewhere():
    a, b, cost = (x.float() for x in problem("shared"))
    own = torch.stack([cost] * len(a))
    assert isinstance(Problem(a, b, cost, 0.1).kernel(), ProductKernel)
    assert isinstance(Problem(a, b, own, 0.1).kernel(), ProductKernel)
    assert isinstance(Problem(a, b, cost, 0.01).kernel(), LogKernel)
    assert isinstance(Problem(a, b, own, 0.01).kernel(), StabilisedKernel)
    assert isinstance(Problem(a[:1], b[:1], cost, 0.01).kernel(), StabilisedKernel)


@pytest.mark.parametrize(
    ("dtype", "reach"),
    [(torch.float32, 59), (torch.float64, 59), (torch.float64, 140), (torch.float64, 299)],
)
def test_products_lose_nothing_at_their_largest_reach(dtype, reach):
    """Potentials may differ by as much as the costs: small weights meet large kernel entries."""
    a, b, cost = (x.to(dtype) for x in problem("shared"))
    epsilon = cost.max().item() / reach
    f, g = (cost.max() * torch.rand_like(x) for x in (a, b))
    product, log = ProductKernel(cost, epsilon), LogKernel(cost, epsilon)
    assert isinstance(Problem(a, b, cost, epsilon).kernel(), ProductKernel)
    close(product.softmin(g, b.log()), log.softmin(g, b.log()))
    close(product.transposed.softmin(f, a.log()), log.transposed.softmin(f, a.log()))


@pytest.mark.parametrize("kind", KINDS)
def test_both_kernels_agree(kind):
    a, b, cost = problem(kind)
    f, g, y = (torch.rand_like(x) for x in (a, b, b))
    product, log = ProductKernel(cost, 0.1), LogKernel(cost, 0.1)
    close(product.softmin(g, b.log()), log.softmin(g, b.log()))
    close(product.transposed.softmin(f, a.log()), log.transposed.softmin(f, a.log()))
    close(product.mean(f, g, b, y), log.mean(f, g, b, y))
    close(product.mean_cost(f, g, b), log.mean_cost(f, g, b))
    close(product.coupling(f, g, a, b * y), log.coupling(f, g, a, b * y))


def held_problems(kind):
    """Problems that a density can be held for: one at a time where they share a cost."""
    a, b, cost = problem(kind)
    if cost.ndim == 3:
        return [(a, b, cost)]
    return [(a[i : i + 1], b[i : i + 1], cost) for i in range(len(a))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [0.1, 0.01, 0.002])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_held_kernel_is_that_of_the_log_domain_wherever_it_is_held(kind, epsilon, dtype):
    for a, b, cost in held_problems(kind):
        a, b, cost = a.to(dtype), b.to(dtype), cost.to(dtype)
        held, log = StabilisedKernel(cost, epsilon), LogKernel(cost, epsilon)
        near = log.softmin(torch.zeros_like(b), b.log())
        for f in (near, near + epsilon * torch.rand_like(a), 5 * torch.rand_like(a)):
            g = log.transposed.softmin(f, a.log())
            close(held.transposed.softmin(f, a.log()), g)
            close(held.softmin(g, b.log()), log.softmin(g, b.log()))
            y, left = torch.rand_like(b), torch.rand_like(a)
            close(held.mean(f, g, b, y), log.mean(f, g, b, y))
            close(held.mean_cost(f, g, b), log.mean_cost(f, g, b))
            backward = held.transposed.mean(g, f, a, left), log.transposed.mean(g, f, a, left)
            close(*backward)
            coupling = log.coupling(f, g, left, y).reshape(cost.shape)
            close(held.coupling(f, g, left, y), coupling)


@pytest.mark.parametrize("way", [1e3, 1e5])
def test_a_kernel_held_far_off_is_not_read_from_there(way):
    """Acceleration may try potentials so large that in float32 a density about them is coarse."""
    _, b, cost = (x.float() for x in problem("per_item"))
    held, log = StabilisedKernel(cost, 0.01), LogKernel(cost, 0.01)
    far = torch.zeros_like(b)
    held.softmin(far + way, b.log())
    expected = log.softmin(far, b.log())
    close(held.softmin(far, b.log()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [0.3, 0.02, 0.002])
def test_steps_of_a_held_kernel_are_sinkhorns_own(kind, epsilon):
    for a, b, cost in held_problems(kind):
        held, log = StabilisedKernel(cost, epsilon), LogKernel(cost, epsilon)
        for scale in (0.1, 100):  # near where it is held, and too far to be looked at once
            f = expected = held.softmin(torch.rand_like(b), b.log())
            f = expected = f + scale * epsilon * torch.rand_like(f)
            for _ in range(5):
                expected = log.softmin(log.transposed.softmin(expected, a.log()), b.log())
            close(held.alternate(f, a.log(), b.log(), 5)[0], expected)


def test_keeping_some_problems_keeps_where_they_are_held():
    a, b, cost = problem("per_item")
    held, log = StabilisedKernel(cost, 0.01), LogKernel(cost, 0.01)
    f = held.softmin(torch.zeros_like(b), b.log())
    index = torch.tensor([2, 0])
    for kernel, whole in ((held.rows(index), log), (held.transposed.rows(index), log.transposed)):
        masses_there, potential = (a, f) if whole is not log else (b, torch.zeros_like(b))
        found = kernel.softmin(potential[index], masses_there[index].log())
        close(found, whole.softmin(potential, masses_there.log())[index])


@pytest.mark.parametrize("penalty", [math.inf, 0.5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_held_or_not_the_solution_is_the_same(penalty, symmetric):
    a, b, cost = problem("per_item")
    if symmetric:
        b, cost = a, cost + cost.mT
    fixed = Problem(a, b, cost, 0.01, symmetric, (penalty, penalty))
    limits = {"tolerance": 1e-6, "max_iterations": 50_000}
    expected = solve_potentials(fixed, LogKernel(cost, 0.01), **limits)
    for plain_steps in (0, 5):
        held = StabilisedKernel(cost, 0.01)
        found = solve_potentials(fixed, held, plain_steps=plain_steps, **limits)
        assert found.converged
        close((found.f, found.g), (expected.f, expected.g), atol=1e-5, rtol=0)


@pytest.mark.parametrize("epsilon", [0.03, 0.01, 0.003])
def test_small_epsilon_in_float32_is_that_of_float64(epsilon):
    """One problem of many points, where exp(−C/ε) in float32 is 0 for most of them."""
    x, y = points(1, 80), points(2, 90)
    cost = torch.cdist(x, y, p=1)
    a, b = masses(3, 80), masses(4, 90)
    exact = ot.sinkhorn(a, b, cost, epsilon=epsilon, **TIGHT)
    limits = {"tolerance": 1e-4, "max_iterations": 20_000}
    found = ot.sinkhorn(a.float(), b.float(), cost.float(), epsilon=epsilon, **limits)
    assert exact.converged
    assert found.converged
    close(found.plan().double(), exact.plan(), atol=2e-4, rtol=0)
    close(found.value.double(), exact.value, atol=1e-4, rtol=1e-4)


def test_the_log_domain_does_not_depend_on_its_blocks(monkeypatch):
    a, b, cost = problem("per_item")
    f, g = torch.rand_like(a), torch.rand_like(b)
    log = LogKernel(cost, 0.05)
    whole = log.softmin(g, b.log()), log.mean_cost(f, g, b), log.coupling(f, g, a, b)
    monkeypatch.setattr("otkd.ot.kernels.base._LOG_DOMAIN_BLOCK", 1)
    blocked = log.softmin(g, b.log()), log.mean_cost(f, g, b), log.coupling(f, g, a, b)
    for left, right in zip(whole, blocked, strict=True):
        close(left, right)


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sharp_gradient_is_as_good_as_the_tolerance(epsilon, dtype):
    """Its adjoint is divided by ε: solved to the tolerance in units of the cost it was 20 % off."""
    x, y = points(1, 40), points(2, 40) / 2
    cost = torch.cdist(x, y, p=1)
    a, b = masses(3, 40), masses(4, 40)

    def gradients(tolerance, dtype):
        a_, b_, cost_ = (v.to(dtype).requires_grad_() for v in (a, b, cost))
        options = objective_and_solver(
            epsilon=epsilon, tolerance=tolerance, max_iterations=20_000, value="sharp", debias=False
        )
        value = solve_divergence(a_, b_, CostMatrices(cost_), *options).value
        return [g.double() for g in torch.autograd.grad(value, (a_, b_, cost_))]

    exact, found = gradients(1e-8, torch.float64), gradients(1e-4, dtype)
    for ours, wanted in zip(found, exact, strict=True):
        assert (ours - wanted).norm() < 0.01 * wanted.norm()


def test_an_adjoint_that_does_not_converge_is_reported(monkeypatch):
    a, b, cost = problem("shared")
    adjoint = otkd.ot.gradients._solve_adjoint

    def stopped(*arguments):
        return adjoint(*arguments[:-1], 2)

    monkeypatch.setattr(otkd.ot.gradients, "_solve_adjoint", stopped)
    limits = {"epsilon": 0.05, "tolerance": 1e-9, "max_iterations": 2000}
    options = objective_and_solver(value="sharp", debias=False, **limits)
    costs = CostMatrices(cost.requires_grad_())
    with pytest.warns(ConvergenceWarning, match="the gradient of transport between 6 and 6"):
        solution = solve_divergence(a, b, costs, *options)
    assert not solution.converged
    assert solution.marginal_error.max() <= 1e-9
    with torch.no_grad():  # where none is asked for there is none to miss
        assert solve_divergence(a, b, costs, *options).converged


def test_not_converged_is_reported_and_told():
    a, b, cost = problem("shared")
    limits = {"epsilon": 0.02, "tolerance": 1e-12, "max_iterations": 2}
    with pytest.warns(ConvergenceWarning, match="did not converge in 2 iterations"):
        solution = ot.sinkhorn(a, b, cost, **limits)
    check_solution(solution, a, b, cost, 0.02, 1e-12)
    assert not solution.converged
    assert solution.iterations == 2


def test_every_problem_that_is_not_solved_is_told_once():
    """By Python's own filter: as often as there are places and problems, not calls or values."""
    a, b, cost = problem("shared")
    small = cost[:5, :5]
    x = a[:, :5] / a[:, :5].sum(-1, keepdim=True)
    limits = {"tolerance": 1e-12, "max_iterations": 2}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for step in range(3):
            shift = step / 10
            ot.sinkhorn(a, b, cost + shift, epsilon=0.02, **limits)  # one place, one problem
        assert len(told) == 1
        ot.sinkhorn(x, x.flip(0), small, epsilon=0.02, **limits)
        ot.sinkhorn(a, b, cost, epsilon=0.01, **limits)
        assert len(told) == 3
        ot.sinkhorn_divergence(a, b, cost, epsilon=0.02, debias=False, **limits)
        otkd.SinkhornLoss(cost, epsilon=0.02, debias=False, **limits)(a.log(), b.log())
        assert len(told) == 5
    assert {warning.filename for warning in told} == {__file__}  # who called, not where it is made


def test_sizes_that_differ_from_step_to_step_are_not_told_each():
    """The union of two heads, and the counted samples of a batch."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for size in range(33, 65):
            a, b = masses(size, 1, size), masses(size + 1, 1, size)
            cost = torch.rand(size, size, dtype=torch.float64)
            ot.sinkhorn(a, b, cost, epsilon=0.01, tolerance=1e-13, max_iterations=1)
    assert len(told) == 1
    assert "up to 64 points" in str(told[0].message)


def test_the_solution_of_a_divergence():
    a, b, cost = problem("shared")
    cost = self_costs(1, 6)["l1"]
    solution = ot.sinkhorn_divergence(a, b, cost, return_solution=True, **TIGHT)
    assert isinstance(solution, ot.DivergenceSolution)
    close(solution.value, ot.sinkhorn_divergence(a, b, cost, **TIGHT), rtol=0, atol=0)
    assert solution.converged
    assert solution.marginal_error.shape == (3,)
    assert solution.marginal_error.max() <= TIGHT["tolerance"]
    assert solution.iterations >= 1
    with pytest.warns(ConvergenceWarning):
        solution = ot.sinkhorn_divergence(
            a, b, cost, epsilon=0.01, max_iterations=1, return_solution=True
        )
    assert not solution.converged
    assert solution.iterations == 1
    assert solution.marginal_error.max() > 1e-4


def test_any_batch_shape():
    a, b, cost = problem("shared", batch=6)
    flat = ot.sinkhorn(a, b, cost, **TIGHT)
    shaped = ot.sinkhorn(a.reshape(2, 3, -1), b.reshape(2, 3, -1), cost, **TIGHT)
    for name in ("value", "transport_cost", "f", "g", "marginal_error"):
        values = getattr(shaped, name)
        assert values.shape[:2] == (2, 3)
        close(values.flatten(0, 1), getattr(flat, name))
    assert shaped.plan().shape == (2, 3, 6, 6)
    single = ot.sinkhorn(a[0], b[0], cost, **TIGHT)
    assert single.value.shape == ()
    close(single.plan(), flat.plan()[0])
    broadcast = ot.sinkhorn(a, b[:1], cost, **TIGHT)
    close(broadcast.value[1:2], ot.sinkhorn(a[1:2], b[:1], cost, **TIGHT).value)


# Limits and laws ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_large_epsilon_gives_the_independent_coupling(kind):
    a, b, cost = problem(kind)
    solution = ot.sinkhorn(a, b, cost, epsilon=1e5, **TIGHT)
    product = (a.unsqueeze(-1) * b.unsqueeze(-2) * cost).sum((-2, -1))
    close(solution.value, product, atol=1e-4, rtol=0)
    close(solution.transport_cost, product, atol=1e-4, rtol=0)


def test_small_epsilon_gives_the_linear_program():
    a, b, cost = (x[0] if x.ndim == 3 or len(x) == 3 else x for x in problem("rectangular"))
    exact = pot().emd2(a.numpy(), b.numpy(), cost.numpy())
    gaps = []
    for epsilon in (0.3, 0.1, 0.03, 0.01, 0.003):
        solution = ot.sinkhorn(a, b, cost, epsilon=epsilon, tolerance=1e-6, max_iterations=50_000)
        assert solution.value >= solution.transport_cost - 1e-6 >= exact - 2e-5
        gaps.append(solution.value.item() - exact)
    assert all(later < earlier for earlier, later in itertools.pairwise(gaps))
    assert gaps[-1] < 0.01


@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.0])
def test_two_point_masses_give_the_cost_between_them(value, epsilon):
    cost = self_costs(1, 5)["l1"]
    a, b = torch.eye(5, dtype=torch.float64)[[1, 3]]
    debiased = ot.sinkhorn_divergence(a, b, cost, epsilon=epsilon, value=value)
    close(debiased, cost[1, 3])
    biased = ot.sinkhorn_divergence(a, b, cost, epsilon=epsilon, value=value, debias=False)
    close(biased, cost[1, 3])


@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize("name", SELF_COSTS)
@settings(max_examples=6)
@given(seed=seeds, n=st.integers(2, 6), epsilon=st.sampled_from([0.4, 1.0]))
def test_zero_at_equality_non_negative_and_symmetric(name, value, seed, n, epsilon):
    cost = self_costs(seed, n)[name]
    options = {"epsilon": epsilon, "value": value, "tolerance": 1e-7, "max_iterations": 20_000}
    a, b = masses(seed, 8, n), masses(seed + 1, 8, n, spread=2)
    same = ot.sinkhorn_divergence(a, a, cost, **options)
    close(same, torch.zeros_like(same), atol=1e-6, rtol=0)
    there = ot.sinkhorn_divergence(a, b, cost, **options)
    close(there, ot.sinkhorn_divergence(b, a, cost, **options), atol=1e-6, rtol=1e-6)
    if value == "dual":  # the sharp variant has no such theorem
        assert there.min() >= -1e-8


def test_gradient_is_zero_at_equality():
    cost = self_costs(3, 6)["sqeuclidean"]
    logits = masses(5, 6).log().requires_grad_()
    value = ot.sinkhorn_divergence(logits.softmax(-1), masses(5, 6), cost, epsilon=0.3, **TIGHT)
    (gradient,) = torch.autograd.grad(value, logits)
    close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


@given(seeds)
def test_equivariance_to_a_permutation_of_the_points(seed):
    a, b, cost = problem("rectangular", seed, n=4)
    rows, columns = torch.randperm(4), torch.randperm(7)
    plain = ot.sinkhorn(a, b, cost, epsilon=0.2, **TIGHT)
    moved = ot.sinkhorn(a[:, rows], b[:, columns], cost[rows][:, columns], epsilon=0.2, **TIGHT)
    close(moved.value, plain.value, atol=1e-9, rtol=1e-9)
    close(moved.f, plain.f[:, rows], atol=1e-6, rtol=1e-6)
    close(moved.plan(), plain.plan()[:, rows][:, :, columns], atol=1e-8, rtol=1e-6)


# Gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["dual", "sharp"])
def test_gradcheck_of_one_transport(kind, value):
    a, b, cost = problem(kind, batch=2, n=3)

    def function(x, y, c):
        p, q = x.softmax(-1), y.softmax(-1)
        return ot.sinkhorn_divergence(p, q, c, epsilon=0.3, debias=False, value=value, **TIGHT)

    inputs = tuple(x.requires_grad_() for x in (a.log(), b.log(), cost))
    if kind == "zero_masses":  # a logit of −inf has no finite difference
        inputs = (a.log(), b.log(), cost)
        finite = [x.masked_fill(x.isinf(), -50.0).requires_grad_() for x in inputs[:2]]
        inputs = (*finite, cost)
    assert gradcheck(function, inputs, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("value", ["dual", "sharp"])
def test_gradcheck_of_the_divergence(value, batched):
    """Costs must stay self-costs, so they move with the positions of their points."""

    def function(logits_a, logits_b, x, y):
        costs = tuple(
            (u.unsqueeze(-2) - v.unsqueeze(-3)).square().sum(-1)
            for u, v in ((x, y), (x, x), (y, y))
        )
        a, b = logits_a.softmax(-1), logits_b.softmax(-1)
        return ot.sinkhorn_divergence(a, b, costs, epsilon=0.7, value=value, **TIGHT)

    shape = (2,) if batched else ()
    x, y = points(1, 3), points(2, 4)
    x, y = x.expand(*shape, 3, 2).clone(), y.expand(*shape, 4, 2).clone()
    x = x + torch.rand_like(x)
    inputs = (masses(3, 2, 3).log(), masses(4, 2, 4).log(), x, y)
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    assert gradcheck(function, leaves, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("debias", [False, True])
def test_gradients_are_those_of_unrolled_autograd(sharp, debias):
    cost = self_costs(2, 5)["l1"]
    logits_a, logits_b = masses(3, 2, 5).log(), masses(4, 2, 5).log()

    def gradients(function):
        inputs = [t.clone().requires_grad_() for t in (logits_a, logits_b, cost)]
        x, y, c = inputs
        value = function(x.softmax(-1), y.softmax(-1), (c, c, c))
        return value.detach(), *torch.autograd.grad(value.sum(), inputs)

    unrolled = gradients(lambda a, b, c: naive.divergence(a, b, c, 0.3, sharp=sharp, debias=debias))
    solved = gradients(
        lambda a, b, c: ot.sinkhorn_divergence(
            a, b, c, epsilon=0.3, debias=debias, value="sharp" if sharp else "dual", **TIGHT
        )
    )
    for left, right in zip(solved[:3], unrolled[:3], strict=True):
        close(left, right, atol=1e-8, rtol=1e-6)
    # A self-cost has one number for (i, j) and (j, i): only the sum of the two is meant.
    close(solved[3] + solved[3].mT, unrolled[3] + unrolled[3].mT, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("value", ["dual", "sharp"])
def test_a_second_derivative_is_refused_rather_than_wrong(value):
    a, b, cost = problem("shared")
    a.requires_grad_()
    found = ot.sinkhorn_divergence(a, b, cost, debias=False, value=value)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(found.sum(), a, create_graph=True)
    assert torch.autograd.grad(found.sum(), a)[0].isfinite().all()


def test_gradients_in_the_masses_are_the_duals_of_pot():
    a, b, cost = problem("rectangular", batch=1)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    ot.sinkhorn(*leaves, cost, epsilon=0.1, **TIGHT).value.sum().backward()
    _, log = pot().sinkhorn(
        a[0].numpy(),
        b[0].numpy(),
        cost.numpy(),
        0.1,
        method="sinkhorn_log",
        stopThr=1e-13,
        numItermax=50_000,
        log=True,
    )  # POT scales exp(−C/ε), not a⊗b·exp(−C/ε): its u is f/ε + log a
    for leaf, key, mass in zip(leaves, ("log_u", "log_v"), (a, b), strict=True):
        dual = 0.1 * (torch.as_tensor(log[key]) - mass[0].log())
        close(centred(leaf.grad[0]), centred(dual), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.filterwarnings("ignore::otkd.ConvergenceWarning")
def test_memory_does_not_grow_with_the_iterations(value):
    a, b, cost = problem("shared")

    def saved(iterations):
        sizes = []
        leaves = [t.clone().requires_grad_() for t in (a, b, cost)]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            ot.sinkhorn_divergence(
                *leaves,
                epsilon=0.05,
                debias=False,
                value=value,
                tolerance=1e-30,
                max_iterations=iterations,
            )
        return sizes

    assert saved(5) == saved(500) != []


# Another implementation --------------------------------------------------------------------------


def test_agreement_with_geomloss():
    samples_loss = pytest.importorskip("geomloss").SamplesLoss
    x, y, blur = points(1, 7), points(2, 9), 0.4
    reference = samples_loss(
        "sinkhorn", p=2, blur=blur, scaling=0.999, debias=True, backend="tensorized"
    )

    def half_squares(u, v):
        return (u[:, None] - v).square().sum(-1) / 2

    costs = half_squares(x, y), half_squares(x, x), half_squares(y, y)

    def value_and_gradients(function):
        a, b = masses(3, 7).requires_grad_(), masses(4, 9).requires_grad_()
        value = function(a, b)
        return value.detach().squeeze(), *torch.autograd.grad(value.sum(), (a, b))

    theirs = value_and_gradients(lambda a, b: reference(a, x, b, y))
    ours = value_and_gradients(
        lambda a, b: ot.sinkhorn_divergence(a, b, costs, epsilon=blur**2, **TIGHT)
    )
    close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
    for left, right in zip(ours[1:], theirs[1:], strict=True):
        close(centred(left), centred(right), rtol=1e-2, atol=1e-2)


def test_a_cloud_flows_onto_another():
    """∂S/∂x through the three costs; n·∂S/∂x is the velocity of a particle of mass 1/n."""
    n = 16
    x, y = 0.3 * points(5, n), 0.3 * points(6, n) + torch.tensor([1.5, 0.5], dtype=torch.float64)
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)

    def costs(x):
        pairs = ((x, y), (x, x), (y, y))
        return tuple((u[:, None] - v).square().sum(-1) / 2 for u, v in pairs)

    values = []
    for _ in range(80):
        x = x.detach().requires_grad_()
        value = ot.sinkhorn_divergence(uniform, uniform, costs(x), epsilon=0.05, tolerance=1e-7)
        (gradient,) = torch.autograd.grad(value, x)
        values.append(value.item())
        if values[-1] < 1e-4:
            break
        x = x - 0.8 * n * gradient
    assert values[0] > 0.5
    assert all(later < earlier for earlier, later in itertools.pairwise(values))
    assert values[-1] < 1e-4


def test_costs_within_each_side_for_different_supports():
    x, y = points(1, 4), points(2, 6)
    a, b = masses(3, 4), masses(4, 6)
    xy = torch.cat([x, y])
    union = (xy[:, None] - xy).norm(dim=-1)
    costs = union[:4, 4:], union[:4, :4], union[4:, 4:]
    both_a = torch.cat([a, torch.zeros_like(b)])
    both_b = torch.cat([torch.zeros_like(a), b])
    options = {"epsilon": 0.3, **TIGHT}
    apart = ot.sinkhorn_divergence(a, b, costs, **options)
    close(apart, ot.sinkhorn_divergence(both_a, both_b, union, **options))
    close(apart, naive.divergence(a, b, costs, 0.3), atol=1e-8, rtol=1e-6)


# Refusals ----------------------------------------------------------------------------------------

A = torch.tensor([0.5, 0.5])
COST = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
REFUSED = {
    "size of the cost": (ValueError, "cost must have shape", A, A, torch.ones(2, 3), {}),
    "cost is a vector": (ValueError, "cost must have shape", A, A, torch.ones(2), {}),
    "batch": (ValueError, "batch shapes", A.expand(2, 2), A.expand(3, 2), COST, {}),
    "no points": (ValueError, "shape", A[:0], A, COST, {}),
    "scalar": (ValueError, "shape", A[0], A, COST, {}),
    "sum": (ValueError, "add up to 1", A * 1.1, A, COST, {}),
    "negative": (ValueError, "at least 0", torch.tensor([1.5, -0.5]), A, COST, {}),
    "NaN mass": (ValueError, "finite", torch.tensor([torch.nan, 1.0]), A, COST, {}),
    "NaN cost": (ValueError, "finite", A, A, COST + torch.nan, {}),
    "infinite cost": (ValueError, "finite", A, A, torch.full((2, 2), torch.inf), {}),
    "ε": (ValueError, "epsilon", A, A, COST, {"epsilon": 0.0}),
    "negative ε": (ValueError, "epsilon", A, A, COST, {"epsilon": -1.0}),
    "NaN ε": (ValueError, "epsilon", A, A, COST, {"epsilon": float("nan")}),
    "tolerance": (ValueError, "tolerance", A, A, COST, {"tolerance": 0.0}),
    "iterations": (ValueError, "max_iterations", A, A, COST, {"max_iterations": 0}),
    "integer masses": (TypeError, "floating-point", torch.tensor([1, 0]), A, COST, {}),
    "integer cost": (TypeError, "floating-point", A, A, COST.long(), {}),
    "list": (TypeError, "floating-point", [0.5, 0.5], A, COST, {}),
    "name as cost": (TypeError, "cost", A, A, "discrete", {}),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("function", [ot.sinkhorn, ot.sinkhorn_divergence])
def test_refused_input(function, case):
    error, message, a, b, cost, options = REFUSED[case]
    with pytest.raises(error, match=message):
        function(a, b, cost, **options)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (torch.tensor([[0.0, 1.0], [2.0, 0.0]]), "symmetric"),
        (torch.tensor([[0.1, 1.0], [1.0, 0.0]]), "diagonal"),
        ((COST, COST), "C_ab, C_aa, C_bb"),
    ],
)
def test_debiasing_refuses_what_is_no_self_cost(cost, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ot.sinkhorn_divergence(A, A, cost)


def test_debiasing_refuses_a_single_rectangular_cost_and_an_unknown_value():
    b = torch.full((3,), 1 / 3)
    with pytest.raises(ValueError, match="square"):
        ot.sinkhorn_divergence(A, b, torch.rand(2, 3))
    assert ot.sinkhorn_divergence(A, b, torch.rand(2, 3), debias=False).isfinite()
    with pytest.raises(ValueError, match="value must be one of"):
        ot.sinkhorn_divergence(A, A, COST, value="primal")


# Points of little mass ---------------------------------------------------------------------------


def test_points_of_little_mass_have_the_potentials_of_a_soft_minimum():
    """The error does not see them: accelerated, they went to −4e5, and the value below zero."""
    a = torch.tensor([2.7481763e-05, 5.4076703e-05, 1.5923842e-13, 0.99991846])
    b = torch.tensor([2.3476464e-04, 2.6517732e-02, 0.97324741, 6.2790384e-08])
    cost = torch.tensor(
        [
            [0, 2.3715816, 2.9929228, 2.4328797],
            [2.3715816, 0, 0.04845623, 0.08585025],
            [2.9929228, 0.04845623, 0, 0.06830963],
            [2.4328797, 0.08585025, 0.06830963, 0],
        ]
    )
    solution = ot.sinkhorn(a, b, cost, epsilon=0.1)
    assert solution.converged
    close(solution.value, torch.tensor(0.06931), atol=2e-4, rtol=0)
    expected = naive.soft_minimum(solution.g, b, cost, 0.1)
    close(solution.f[:3], expected[:3], atol=0.011, rtol=0)


@pytest.mark.parametrize("penalty", [None, 5.0])
def test_values_of_peaked_problems_that_are_solved(penalty):
    """⟨P, C⟩ + ε·KL of the plan, which knows nothing of the potentials, is the dual value."""
    for seed in range(4):
        a, b = masses(seed, 64, 12, spread=12).float(), masses(seed + 9, 64, 12, spread=12).float()
        x = 0.3 * points(seed, 12, 2) + (torch.arange(12) % 3)[:, None]
        cost = torch.cdist(x, x).square().float()
        cost = cost / cost.mean()
        problem = Problem(a, b, cost, 0.03, penalties=(penalty or math.inf,) * 2)
        limits = {"tolerance": 1e-4, "max_iterations": 200}
        found = solve_potentials(problem, problem.kernel(), **limits)
        solved = found.marginal_error <= 1e-4
        assert solved.sum() > 50
        f, g = found.f.double(), found.g.double()
        plan = naive.plan(f, g, a.double(), b.double(), cost.double(), 0.03)
        entropy = naive.objective(plan, a.double(), b.double(), cost.double(), 0.03)
        if penalty is None:
            value = (a * f).sum(-1) + (b * g).sum(-1)
            assert (value - entropy)[solved].abs().max() < 2e-3
        else:
            best = problem.source.damping(0.03) * naive.soft_minimum(
                g, b.double(), cost.double(), 0.03
            )
            assert (best - f)[solved].abs().max() < 0.01


def test_a_cost_of_one_sign_only_is_not_needed_for_its_gradient():
    cost = (6 - 12 * torch.eye(4)).requires_grad_()
    masses_ = torch.tensor([[9.0, 0, -200, -200]]).softmax(-1)
    ot.sinkhorn(masses_, masses_, cost, epsilon=0.1).value.sum().backward()
    assert cost.grad.isfinite().all()


def test_costs_within_a_side_must_be_symmetric():
    a, b, cost = problem("shared", n=4)
    skewed = cost.clone().fill_diagonal_(0)
    for costs in ((cost, skewed, skewed), (cost, cost[:3], cost[:3])):
        with pytest.raises(ValueError, match="a self-cost must be square and symmetric"):
            ot.sinkhorn_divergence(a, b, costs)


def test_no_problem_with_a_cost_of_its_own():
    value = ot.sinkhorn_divergence(torch.ones(0, 4), torch.ones(0, 4), torch.zeros(0, 4, 4))
    assert value.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masses_of_half_precision_are_solved(dtype):
    a, b, cost = problem("shared", n=12)
    half_a, half_b = a.to(dtype).requires_grad_(), b.to(dtype)
    solution = ot.sinkhorn(half_a, half_b, cost.float(), epsilon=0.1)
    assert solution.converged
    expected = ot.sinkhorn(a, b, cost, epsilon=0.1)
    close(solution.value.double(), expected.value, atol=5e-3, rtol=0)
    (gradient,) = torch.autograd.grad(solution.value.sum(), half_a)
    assert (gradient.double() - expected.f).abs().max() < 0.05
