"""Newton's method on the semi-dual, for problems with few targets."""

import pytest
import torch

import otkd
from otkd import ot
from otkd.ot.few_targets import newton_potentials
from tests import naive
from tests.problems import check_solution, generator, masses

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (3, 3), (9, 4), (10, 10)])
def test_few_targets_need_few_iterations(size, epsilon, zero):
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
        g, taken = newton_potentials(a, b, cost, 0.01, start=start, **limits)
        values.append(semi_dual(g))
        assert (values[-1] >= values[-2] - 1e-12).all()
    assert taken < 39
    f = naive.soft_minimum(g, b, cost, 0.01)
    plan = naive.plan(f, g, a, b, cost, 0.01)
    close(plan.sum(-2), b, atol=1e-11, rtol=0)
