"""Transport whose marginals are penalised by ρ·KL in place of being held."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import otkd
from otkd import functional as F
from otkd.costs import CostMatrices
from otkd.ot.divergence import solve_divergence
from otkd.ot.problem import Problem
from otkd.ot.solver import solve_potentials
from otkd.supports import TopK
from tests import naive
from tests.problems import (
    KINDS,
    logits,
    masses,
    objective_and_solver,
    points,
    problem,
    seeds,
    self_costs,
)

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
TIGHT = {"tolerance": 1e-11, "max_iterations": 20_000}
F64, HELD = torch.float64, math.inf


def measures(kind: str, seed: int = 0, batch: int = 3, n: int = 6):
    """As a problem, with masses that add up to anything."""
    a, b, cost = problem(kind, seed, batch, n)
    totals = 0.2 + 2 * torch.rand(2, batch, 1, dtype=F64)
    return a * totals[0], b * totals[1], cost


def divergence(a, b, cost, epsilon, rho, *, debias=False, **options):
    costs = CostMatrices(cost, cost, cost) if debias else CostMatrices(cost)
    options = {**TIGHT, **options}
    return solve_divergence(
        a,
        b,
        costs,
        *objective_and_solver(epsilon=epsilon, marginal_relaxation=rho, debias=debias, **options),
    )


def slopes(function, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


# Value and plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("epsilon", "rho"),
    [(0.1, 0.3), (0.5, 2.0), (1.0, 0.1), (0.3, (0.2, 3.0)), (0.3, (1.0, HELD)), (0.3, (HELD, 1.0))],
)
def test_value_and_plan_are_those_of_pot(kind, epsilon, rho):
    pot = pytest.importorskip("ot")
    a, b, cost = measures(kind)
    solution = divergence(a, b, cost, epsilon, rho)
    assert solution.report.converged
    fields = solution.parts[0]
    plan = naive.plan(fields.f, fields.g, a, b, cost, epsilon)
    for i in range(len(a)):
        rows, columns = a[i].nonzero()[:, 0], b[i].nonzero()[:, 0]  # it wants masses above zero
        matrix = (cost[i] if cost.ndim == 3 else cost)[rows][:, columns]
        one, other = a[i, rows], b[i, columns]
        expected = torch.as_tensor(
            pot.unbalanced.sinkhorn_unbalanced(
                *(x.numpy() for x in (one, other, matrix)),
                epsilon,
                rho,
                reg_type="kl",
                stopThr=1e-13,
                numItermax=20_000,
            )
        )
        close(plan[i][rows][:, columns], expected, atol=1e-9, rtol=1e-7)
        # Its own "total_cost" leaves the masses out of KL(x‖y) = Σ x·log(x/y) − x + y.
        primal = naive.unbalanced_objective(expected, one, other, matrix, epsilon, rho)
        close(solution.value[i], primal, atol=1e-9, rtol=1e-7)


@given(seeds, st.sampled_from(KINDS), st.sampled_from([0.2, 1.0]), st.sampled_from([0.2, 3.0]))
def test_primal_equals_dual_and_no_plan_is_better(seed, kind, epsilon, rho):
    a, b, cost = measures(kind, seed, batch=2, n=4)
    solution = divergence(a, b, cost, epsilon, rho)
    fields = solution.parts[0]
    plan = naive.plan(fields.f, fields.g, a, b, cost, epsilon)
    here = a.unsqueeze(-1) * b.unsqueeze(-2) > 0
    safe = a.clamp(min=1e-300), b.clamp(min=1e-300)  # 0·log(0/0) = 0
    primal = naive.unbalanced_objective(plan, *safe, cost, epsilon, rho)
    close(primal, solution.value, atol=1e-9, rtol=1e-8)
    for scale in (0.01, 0.1):
        noise = torch.exp(scale * torch.randn(plan.shape, dtype=F64))
        other = naive.unbalanced_objective(plan * noise * here, *safe, cost, epsilon, rho)
        assert (other >= primal - 1e-12).all()


def test_two_points_in_closed_form():
    """One source, one target: P minimises P·C + ε·KL(P‖ab) + ρ·KL(P‖a) + ρ·KL(P‖b)."""
    a, b, c, epsilon, rho = 0.7, 1.9, 1.3, 0.4, 0.8
    mass = math.exp((epsilon * math.log(a * b) + rho * math.log(a * b) - c) / (epsilon + 2 * rho))
    expected = epsilon * a * b + rho * (a + b) - (epsilon + 2 * rho) * mass
    one, other, cost = (torch.tensor(x, dtype=F64) for x in ([[a]], [[b]], [[c]]))
    solution = divergence(one, other, cost, epsilon, rho)
    assert solution.value.item() == pytest.approx(expected, rel=1e-9)
    fields = solution.parts[0]
    plan = naive.plan(fields.f, fields.g, one, other, cost, epsilon)
    assert plan.item() == pytest.approx(mass, rel=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_marginal_error_is_the_distance_to_the_optimal_marginal(symmetric):
    """Row sums of the plan against a·exp(−f/ρ), which they are at the optimum."""
    a, b, cost = measures("shared")
    if symmetric:
        b, cost = a, self_costs(1, 6)["l1"]
    for steps in (1, 2, 5):
        fixed = Problem(a, b, cost, 0.1, symmetric, penalties=(0.5, 0.5))
        found = solve_potentials(fixed, fixed.kernel(), tolerance=1e-15, max_iterations=steps)
        assert found.iterations == steps
        assert not found.converged
        plan = naive.plan(found.f, found.g, a, b, cost, 0.1)
        error = (plan.sum(-1) - a * (-found.f / 0.5).exp()).abs().sum(-1)
        close(found.marginal_error, error, rtol=1e-9, atol=1e-14)
        if not symmetric:  # the columns were updated last
            close(plan.sum(-2), b * (-found.g / 0.5).exp(), rtol=1e-9, atol=1e-14)


# Gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("rho", [0.2, 2.0, (0.2, 3.0), (1.0, HELD), (HELD, 0.5)])
def test_gradients_in_masses_and_cost(kind, rho):
    a, b, cost = measures(kind, batch=2, n=3)

    def value(*leaves):
        return divergence(*leaves, 0.3, rho).value

    leaves = tuple(x.requires_grad_() for x in (a, b, cost))
    assert gradcheck(value, leaves, atol=1e-7, fast_mode=True)
    for left, right in zip(
        slopes(value, a, b, cost),
        slopes(lambda *x: naive.unbalanced_sinkhorn(*x, 0.3, rho)[0], a, b, cost),
        strict=True,
    ):
        close(left, right, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("rho", [(0.3, HELD), (HELD, 0.3), (0.1, 2.0)])
def test_a_pair_through_the_logits(rho):
    """A held student and a free teacher are not a free student and a held teacher."""
    student, teacher = logits(1, 3, 6), logits(2, 3, 6)
    cost = self_costs(1, 6)["l1"]
    loss = otkd.SinkhornLoss(
        cost, epsilon=0.3, marginal_relaxation=rho, debias=False, reduction="none", **TIGHT
    )

    def naively(z):
        q, p = (naive.log_distribution(x).exp() for x in (z, teacher))
        return naive.unbalanced_sinkhorn(q, p, cost, 0.3, rho)[0]

    for left, right in zip(
        slopes(lambda z: loss(z, teacher), student), slopes(naively, student), strict=True
    ):
        close(left, right, atol=1e-8, rtol=1e-6)
    if HELD in rho:  # with a side held the plan has that side's mass, and its marginal
        form = solve_divergence(
            *(naive.log_distribution(x).exp() for x in (student, teacher)),
            CostMatrices(cost),
            loss.objective,
            loss.solver,
        )
        side = rho.index(HELD)
        masses = naive.log_distribution((student, teacher)[side]).exp()
        close(form.parts[0].plan().sum(-1 if side == 0 else -2), masses, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [4, 14])
@pytest.mark.parametrize("rho", [0.05, (0.05, 0.3), (0.3, HELD)])
def test_the_tolerance_is_relative_to_the_mass_of_the_plan(dtype, size, rho):
    """Where the cheapest pairs have hardly any mass, it is all of a far heavier plan."""
    a, b = masses(1, 3, size, spread=8.0), 20 * masses(2, 3, size, spread=8.0)
    cost = 3 * torch.randn(size, size, dtype=F64) - 3
    _, plan = naive.unbalanced_sinkhorn(a, b, cost, 0.05, rho, iterations=2000)
    leaf = cost.to(dtype).requires_grad_()
    options = {"tolerance": 1e-4, "max_iterations": 1000}
    solution = divergence(a.to(dtype), b.to(dtype), leaf, 0.05, rho, **options)
    assert solution.converged
    found = solution.parts[0].plan().double()
    error = (found - plan).abs().sum((-2, -1)) / plan.sum((-2, -1))
    assert error.max() < 0.01


@pytest.mark.parametrize("size", [3, 8, 20])
@pytest.mark.parametrize("rho", [100.0, (100.0, 1.0), (100.0, HELD)])
def test_a_large_penalty_takes_few_iterations(size, rho):
    """Where plain ones take in the order of ρ/ε of them; by Newton's method, or by constants."""
    a, b = 0.5 * masses(1, 4, size, spread=2.0), 3 * masses(2, 4, size, spread=2.0)
    x = points(3, size, 8)
    cost = torch.cdist(x, x).square()
    cost = cost / cost.mean()
    found = divergence(a, b, cost, 0.05, rho, tolerance=1e-6, max_iterations=100)
    assert found.converged
    expected = divergence(a, b, cost, 0.05, rho)
    close(found.value, expected.value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rho", [0.2, 2.0])
def test_gradients_of_the_debiased_divergence(rho):
    a, b, _ = measures("shared", batch=2, n=4)
    cost = self_costs(1, 4)["sqeuclidean"]

    def value(a, b, x):
        return divergence(a, b, x + x.mT, 0.3, rho, debias=True).value

    def reference(a, b, x):
        return naive.unbalanced_divergence(a, b, (x + x.mT,) * 3, 0.3, rho)

    leaves = a, b, cost / 2
    assert gradcheck(value, tuple(x.requires_grad_() for x in leaves), atol=1e-7, fast_mode=True)
    for left, right in zip(slopes(value, *leaves), slopes(reference, *leaves), strict=True):
        close(left, right, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("support", ["auto", TopK(2), TopK(2, tail=False)])
@pytest.mark.parametrize("debias", [True, False])
def test_gradcheck_through_the_logits(support, debias):
    student = torch.tensor([[3.0, 1, -1, 0, -0.4]], dtype=F64, requires_grad=True)
    teacher = torch.tensor([[-1.0, 2, 0, 3, -0.5]], dtype=F64)
    options = {"cost": self_costs(1, 5)["l1"], "support": support, "debias": debias, **TIGHT}

    def value(z):
        return F.sinkhorn_divergence(z, teacher, epsilon=0.3, marginal_relaxation=0.7, **options)

    assert gradcheck(value, (student,), atol=1e-7)


def test_in_float32_and_with_masses_of_zero():
    a, b, cost = measures("zero_masses")
    leaves = [x.float().requires_grad_() for x in (a, b, cost)]
    solution = divergence(*leaves, 0.1, 0.5, tolerance=1e-5, max_iterations=1000)
    exact = slopes(lambda *x: divergence(*x, 0.1, 0.5).value, a, b, cost)
    gradient = torch.autograd.grad(solution.value.sum(), leaves)
    assert solution.value.dtype == torch.float32
    for left, right in zip((solution.value, *gradient), exact, strict=True):
        close(left.double(), right, atol=1e-3, rtol=1e-3)


def test_gradients_where_there_is_no_mass_are_those_where_there_is_hardly_any():
    a, b, _ = measures("zero_masses")
    cost = self_costs(1, 6)["sqeuclidean"]
    hardly = [x.clamp(min=1e-14) for x in (a, b)]
    expected = slopes(
        lambda a, b: naive.unbalanced_divergence(a, b, (cost,) * 3, 0.3, 0.5), *hardly
    )
    for tolerance in (1e-11, 1e-6):  # also there the solver stops when it is done elsewhere
        options = {"debias": True, "tolerance": tolerance}
        actual = slopes(lambda a, b: divergence(a, b, cost, 0.3, 0.5, **options).value, a, b)  # noqa: B023
        for left, right in zip(actual, expected, strict=True):
            close(left, right, atol=10 * tolerance, rtol=1e-6)


# Limits and laws ---------------------------------------------------------------------------------


@pytest.mark.parametrize("debias", [True, False])
def test_a_large_penalty_is_balanced_transport(debias):
    a, b, cost = masses(1, 3, 6), masses(2, 3, 6), self_costs(1, 6)["euclidean"]
    balanced = divergence(a, b, cost, 0.2, None, debias=debias).value
    gaps = []
    for rho in (10.0, 100.0, 1000.0):
        value = divergence(a, b, cost, 0.2, rho, debias=debias).value
        if not debias:
            assert (value <= balanced + 1e-10).all()  # there are more plans to choose from
        gaps.append((value - balanced).abs().max().item())
    assert gaps[1] < gaps[0] / 5
    assert gaps[2] < gaps[1] / 5
    assert gaps[2] < 1e-3
    z, t = logits(1, 3, 6), logits(2, 3, 6)
    options = {"cost": cost, "epsilon": 0.2, "debias": debias, **TIGHT}
    left, right = (
        slopes(
            lambda z, rho=rho: F.sinkhorn_divergence(z, t, marginal_relaxation=rho, **options), z
        )
        for rho in (1000.0, None)
    )
    close(left[1], right[1], atol=2e-3, rtol=0)


@given(seeds, st.sampled_from(["l1", "sqeuclidean", "discrete"]), st.sampled_from([0.2, 2.0, 20.0]))
def test_laws_of_the_debiased_divergence(seed, name, rho):
    a, b, _ = measures("shared", seed, n=5)
    cost = self_costs(seed, 5)[name]

    def value(a, b):
        return divergence(a, b, cost, 0.3, rho, debias=True).value

    result = value(a, b)
    assert (result >= -1e-10).all()
    close(value(b, a), result, atol=1e-9, rtol=1e-8)
    same, slope = slopes(lambda a, b=b: value(a, b), b)
    close(same, torch.zeros_like(same), atol=1e-10, rtol=0)
    close(slope, torch.zeros_like(slope), atol=1e-7, rtol=0)


def test_the_debiased_divergence_of_two_masses_at_one_point():
    """By the closed form of one point: with ε/2·(m_a − m_b)², or it would be negative.

    OT(m, m') at cost 0 is ε·m·m' + ρ·(m + m') − (ε + 2ρ)·(m·m')^((ε + ρ)/(ε + 2ρ)), so that the
    terms in m·m' of OT(a, b) − ½·OT(a, a) − ½·OT(b, b) are −ε/2·(m_a − m_b)².
    """
    epsilon, rho, zero = 0.5, 0.8, torch.zeros(1, 1, dtype=F64)
    for m_a, m_b in ((0.5, 1.5), (1.0, 0.1), (1.2, 1.2)):
        power = (epsilon + rho) / (epsilon + 2 * rho)
        powers = m_a ** (2 * power) / 2 + m_b ** (2 * power) / 2 - (m_a * m_b) ** power
        a, b = torch.tensor([[m_a]], dtype=F64), torch.tensor([[m_b]], dtype=F64)
        value = divergence(a, b, zero, epsilon, rho, debias=True).value.item()
        assert value == pytest.approx((epsilon + 2 * rho) * powers, rel=1e-9, abs=1e-12)
        raw = divergence(a, b, zero, epsilon, rho).value.item()
        for one in (a, b):
            raw -= divergence(one, one, zero, epsilon, rho).value.item() / 2
        assert value - raw == pytest.approx(epsilon / 2 * (m_a - m_b) ** 2, abs=1e-12)


def test_a_distant_mass_is_given_up_rather_than_moved():
    cost = torch.tensor([[0.0, 50], [50, 0]], dtype=F64)
    a, b = torch.tensor([[0.9, 0.1]], dtype=F64), torch.tensor([[1.0, 0.0]], dtype=F64)
    moved = divergence(a, b, cost, 0.1, None).value.item()
    given_up = divergence(a, b, cost, 0.1, 1.0).value.item()
    assert moved == pytest.approx(5, abs=0.1)
    assert given_up < 0.3


def test_heads_without_a_tail_keep_the_mass_they_have():
    """Balanced they are renormalised, and these are equal; penalised they are not."""
    head = torch.tensor([[2.0, 1.0, 0, 0, 0, 0]], dtype=F64)
    flatter = torch.tensor([[2.0, 1.0, 0.5, 0.5, 0.5, 0.5]], dtype=F64)
    cost = 1 - torch.eye(6, dtype=F64)
    options = {"cost": cost, "epsilon": 0.3, "support": TopK(2, tail=False), **TIGHT}
    held = F.sinkhorn_divergence(head, flatter, **options)
    free = F.sinkhorn_divergence(head, flatter, marginal_relaxation=1.0, **options)
    assert abs(held.item()) < 1e-9
    assert free.item() > 1e-3
    a, b = (naive.log_distribution(z).exp()[:, :2] for z in (head, flatter))
    expected = naive.unbalanced_divergence(a, b, (cost[:2, :2],) * 3, 0.3, 1.0)
    close(free, expected, atol=1e-9, rtol=1e-8)


# The loss ----------------------------------------------------------------------------------------


def test_the_loss_and_what_it_refuses():
    cost = self_costs(1, 6)["l1"]
    student, teacher = logits(1, 4, 6), logits(2, 4, 6)
    loss = otkd.SinkhornLoss(cost, epsilon=0.3, marginal_relaxation=0.5, reduction="none", **TIGHT)
    q, p = (naive.log_distribution(z).exp() for z in (student, teacher))
    value = loss(student, teacher)
    close(value, naive.unbalanced_divergence(q, p, (cost,) * 3, 0.3, 0.5), atol=1e-9, rtol=1e-8)
    assert loss.last_report.converged
    for rho in (0.0, -1.0, -math.inf, math.nan, (1.0, 0.0)):
        with pytest.raises(ValueError, match="marginal_relaxation must be a finite number above 0"):
            otkd.SinkhornLoss(cost, marginal_relaxation=rho)
        with pytest.raises(ValueError, match="marginal_relaxation must be a finite number above 0"):
            F.sinkhorn_divergence(student, teacher, cost=cost, marginal_relaxation=rho)
    for held in (math.inf, (math.inf, math.inf)):  # as in POT
        loss = otkd.SinkhornLoss(
            cost, epsilon=0.3, marginal_relaxation=held, reduction="none", **TIGHT
        )
        balanced = otkd.SinkhornLoss(cost, epsilon=0.3, reduction="none", **TIGHT)
        close(loss(student, teacher), balanced(student, teacher), rtol=0, atol=0)
    with pytest.raises(ValueError, match="a pair"):
        otkd.SinkhornLoss(cost, marginal_relaxation=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="is not a divergence"):
        otkd.SinkhornLoss(cost, marginal_relaxation=(1.0, math.inf))
    with pytest.raises(ValueError, match="has only value='dual'"):
        otkd.SinkhornLoss(cost, marginal_relaxation=1.0, value="sharp")
