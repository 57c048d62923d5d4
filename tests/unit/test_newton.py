"""Newton's method on the semi-dual, for problems with few targets."""

import pytest
import torch

import otkd
from otkd import ot
from otkd.ot.newton import newton_potentials
from tests import naive
from tests.problems import check_solution, generator, masses

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (3, 3), (9, 4), (10, 10)])
def test_newton_need_few_iterations(size, epsilon, zero):
    """Where Sinkhorn's own rate would ask for exp(C/ε) of them."""
    n, m = size
    a, b = masses(1, 5, n, spread=3), masses(2, 5, m, spread=3)
    b = b.roll(1, 0).masked_fill(torch.eye(5, m, dtype=torch.bool), 0) if zero else b
    b = b / b.sum(-1, keepdim=True)
    where = torch.rand(max(size), 8, dtype=torch.float64, generator=generator(3))
    cost = torch.cdist(where[:n], where[:m])
    limits = {"epsilon": epsilon, "max_iterations": 60}
    solution = ot.sinkhorn(a, b, cost, tolerance=1e-9, **limits)
    assert solution.converged
    check_solution(solution, a, b, cost, epsilon, 1e-9)
    single = ot.sinkhorn(a.float(), b.float(), cost.float(), **limits)
    assert single.converged
    close(single.value.double(), solution.value, atol=1e-5, rtol=1e-5)


def test_few_well_separated_classes_are_solved_at_the_defaults():
    """Rows of classifiers of three classes, which iterations did not solve in hundreds."""
    for seed in range(20):
        rows = torch.randn(3, 64, generator=generator(seed))
        student, teacher = (3 * torch.randn(32, 3, generator=generator(seed + k)) for k in (50, 99))
        for epsilon in (0.1, 0.02):
            loss = otkd.SinkhornLoss(embedding=rows, epsilon=epsilon)
            loss(student, teacher)
            assert loss.last_report.converged
            assert loss.last_report.iterations < 40


@pytest.mark.parametrize("seed", range(5))
def test_the_dual_never_falls(seed):
    """From anywhere: on a plateau a step that is not cut is far too long."""
    a, b = masses(seed, 4, 6, spread=4), masses(seed + 1, 4, 5, spread=4)
    cost = torch.rand(6, 5, dtype=torch.float64, generator=generator(seed + 2))
    start = 2 * torch.randn(4, 5, dtype=torch.float64, generator=generator(seed + 3))

    def semi_dual(g):
        soft = -0.01 * torch.logsumexp(b.log().unsqueeze(-2) + (g.unsqueeze(-2) - cost) / 0.01, -1)
        return (a * soft).sum(-1) + (b * g).sum(-1)

    values = [semi_dual(start)]
    for steps in range(1, 40):
        limits = {"tolerance": 1e-9, "max_steps": steps}
        g, taken = newton_potentials(a.log(), b.log(), cost, 0.01, start=start, **limits)
        values.append(semi_dual(g))
        assert (values[-1] >= values[-2] - 1e-12).all()
    assert taken < 39
    f = naive.soft_minimum(g, b, cost, 0.01)
    plan = naive.plan(f, g, a, b, cost, 0.01)
    close(plan.sum(-2), b, atol=1e-11, rtol=0)


def tokens(seed, n, positions, width=16):
    """Peaked masses on well-separated tokens, the support of a position each."""
    where = torch.randn(positions, n, width, dtype=torch.float64, generator=generator(seed))
    cost = torch.cdist(where, where).square()
    a, b = (masses(seed + k, positions, n, spread=3) for k in (1, 2))
    return a, b, cost / cost.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.005, 0.01])
def test_supports_are_solved_at_the_defaults(epsilon, dtype, monkeypatch):
    """Where the limit of 200 iterations leaves most of them unsolved."""
    a, b, cost = (x.to(dtype) for x in tokens(1, 40, 12))
    found = ot.sinkhorn(a, b, cost, epsilon=epsilon, tolerance=1e-4, max_iterations=200)
    assert found.converged
    exact = ot.sinkhorn(*(x.double() for x in (a, b, cost)), epsilon=epsilon, tolerance=1e-7)
    assert exact.converged
    close(found.value.double(), exact.value, atol=2e-4, rtol=0)
    monkeypatch.setattr(otkd.ot.solver, "_MOST_TARGETS", 0)
    with pytest.warns(otkd.ConvergenceWarning):
        alone = ot.sinkhorn(a, b, cost, epsilon=epsilon, tolerance=1e-4, max_iterations=200)
    assert not alone.converged


@pytest.mark.parametrize("limit", [1, 13, 15, 20, 30])
@pytest.mark.parametrize("shared", [False, True])
def test_stopped_midway_it_reports_the_error_it_has(limit, shared):
    a, b, cost = tokens(2, 14, 5)
    cost = cost[0] if shared else cost
    with pytest.warns(otkd.ConvergenceWarning):
        found = ot.sinkhorn(a, b, cost, epsilon=0.01, tolerance=1e-12, max_iterations=limit)
    assert found.iterations <= limit
    rows = (found.plan().sum(-1) - a).abs().sum(-1)
    close(rows, found.marginal_error, atol=1e-12, rtol=1e-5)


def test_what_else_is_in_the_batch_changes_nothing():
    """Problems that iterations solve, and others that they do not."""
    a, b, cost = tokens(3, 24, 6)
    b = torch.cat([b[:3], a[3:]])
    options = {"epsilon": 0.02, "tolerance": 1e-6}
    together = ot.sinkhorn(a, b, cost, **options)
    assert together.converged
    for place in range(len(a)):
        rows = slice(place, place + 1)
        alone = ot.sinkhorn(a[rows], b[rows], cost[rows], **options)
        close(together.f[rows], alone.f, atol=1e-7, rtol=1e-7)
