import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import otkd
from otkd import ot
from otkd.costs import DiscreteCost, MatrixCost, OrdinalCost
from otkd.ot.exact import LARGEST_PROGRAM
from tests import naive
from tests.problems import KINDS, centred, masses, problem, seeds, self_costs

pot = pytest.importorskip("ot")
pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close


def reference(a, b, cost):
    """POT's network simplex, problem by problem."""
    values = []
    for i in range(len(a)):
        matrix = cost[i] if cost.ndim == 3 else cost
        values.append(float(pot.emd2(a[i].numpy(), b[i].numpy(), matrix.numpy().copy())))
    return torch.tensor(values, dtype=torch.float64)


@given(seeds, st.sampled_from(KINDS))
def test_value_is_that_of_pot(seed, kind):
    a, b, cost = problem(kind, seed)
    close(ot.wasserstein(a, b, cost), reference(a, b, cost), atol=1e-12, rtol=1e-9)
    close(ot.wasserstein(a, b, cost, p=2), reference(a, b, cost**2), atol=1e-12, rtol=1e-9)


def test_any_batch_shape_and_precision():
    a, b, cost = problem("rectangular", batch=6)
    exact = reference(a, b, cost)
    shaped = ot.wasserstein(a.reshape(2, 3, -1), b.reshape(2, 3, -1), cost)
    close(shaped, exact.reshape(2, 3))
    close(ot.wasserstein(a[0], b[0], cost), exact[0])
    single = ot.wasserstein(a.float(), b.float(), cost.float())
    assert single.dtype == torch.float32
    close(single.double(), exact, atol=1e-5, rtol=1e-5)


@given(seeds, st.integers(2, 9), st.sampled_from([1.0, 1.5, 2.0]))
def test_monotone_transport_for_ordered_tokens(seed, n, p):
    a, b = masses(seed, 3, n, spread=2), masses(seed + 1, 3, n)
    if n > 3:
        a[:, 2], b[1, :2] = 0, 0
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    value = ot.wasserstein(a, b, OrdinalCost(p))
    corner = [
        naive.monotone_transport(x, y, p) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    close(value, torch.tensor(corner, dtype=torch.float64), atol=1e-12, rtol=1e-9)
    matrix = OrdinalCost(p)(n, n).double()
    close(value, reference(a, b, matrix), atol=1e-6, rtol=1e-6)  # the matrix is float32
    close(ot.wasserstein(a, b, OrdinalCost(1.0), p=p), value)


def test_a_concave_ordinal_cost_has_no_monotone_plan():
    a, b = masses(1, 3, 6), masses(2, 3, 6)
    places = torch.arange(6, dtype=torch.float64)
    matrix = (places[:, None] - places).abs().sqrt()
    close(ot.wasserstein(a, b, OrdinalCost(0.5)), reference(a, b, matrix))


@given(seeds, st.integers(2, 8), st.sampled_from([1.0, 3.0]))
def test_the_discrete_cost_gives_total_variation(seed, n, p):
    a, b = masses(seed, 2, n), masses(seed + 1, 2, n)
    tvd = (a - b).abs().sum(-1) / 2
    close(ot.wasserstein(a, b, DiscreteCost(), p=p), tvd)
    close(ot.wasserstein(a, b, 1 - torch.eye(n, dtype=torch.float64)), tvd)


@given(seeds)
def test_two_classes(seed):
    a, b, cost = problem("per_item", seed, batch=4, n=2)
    close(ot.wasserstein(a, b, cost), reference(a, b, cost), atol=1e-12, rtol=1e-9)


COSTS = {
    "matrix": problem("shared", n=4)[2],
    "per item": problem("per_item", n=4, batch=2)[2],
    "discrete": DiscreteCost(),
    **{f"ordinal-{p}": OrdinalCost(p) for p in (0.5, 1.0, 1.5, 2.0)},
}


@pytest.mark.parametrize("name", COSTS)
def test_gradcheck_through_the_softmax(name):
    a, b = masses(1, 2, 4, spread=2), masses(2, 2, 4)
    cost = COSTS[name]

    def function(x, y, *matrix):
        return ot.wasserstein(x.softmax(-1), y.softmax(-1), *(matrix or (cost,)))

    inputs = [a.log().requires_grad_(), b.log().requires_grad_()]
    if isinstance(cost, torch.Tensor):
        inputs.append(cost.clone().requires_grad_())
    assert gradcheck(function, inputs)


def test_gradcheck_with_two_classes():
    a, b, cost = problem("per_item", batch=3, n=2)
    inputs = (a.log().requires_grad_(), b.log().requires_grad_(), cost.requires_grad_())
    assert gradcheck(lambda x, y, c: ot.wasserstein(x.softmax(-1), y.softmax(-1), c), inputs)


def test_gradients_are_the_duals_of_pot():
    a, b, cost = problem("rectangular", batch=1)
    leaves = [t.clone().requires_grad_() for t in (a, b, cost)]
    ot.wasserstein(*leaves).sum().backward()
    plan, log = pot.emd(a[0].numpy(), b[0].numpy(), cost.numpy().copy(), log=True)
    close(centred(leaves[0].grad[0]), centred(torch.as_tensor(log["u"])), atol=1e-9, rtol=1e-9)
    close(centred(leaves[1].grad[0]), centred(torch.as_tensor(log["v"])), atol=1e-9, rtol=1e-9)
    close(leaves[2].grad, torch.as_tensor(plan), atol=1e-12, rtol=1e-9)


@given(seeds, st.sampled_from(KINDS))
def test_potentials_are_optimal_and_feasible_where_there_is_no_mass_too(seed, kind):
    a, b, cost = problem(kind, seed)
    leaves = a.requires_grad_(), b.requires_grad_()
    value = ot.wasserstein(*leaves, cost)
    f, g = torch.autograd.grad(value.sum(), leaves)
    assert (f.unsqueeze(-1) + g.unsqueeze(-2) - cost).max() < 1e-9
    close((a * f).sum(-1) + (b * g).sum(-1), value, atol=1e-9, rtol=1e-9)


def test_a_subgradient_where_the_plan_is_degenerate():
    a = masses(1, 4).log().requires_grad_()
    ot.wasserstein(a.softmax(-1), masses(1, 4), self_costs(0, 4)["l1"]).backward()
    assert a.grad.isfinite().all()


def test_limit_of_the_loss():
    n = LARGEST_PROGRAM + 1
    logits = torch.randn(1, n)
    with pytest.raises(ValueError, match=f"the limit is {LARGEST_PROGRAM} tokens"):
        otkd.WassersteinLoss(MatrixCost(torch.rand(n, n)))(logits, logits)
    for cost in ("discrete", "ordinal", OrdinalCost(2)):
        assert otkd.WassersteinLoss(cost)(logits, logits.flip(-1)) > 0
    assert LARGEST_PROGRAM == 1024


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_the_loss_masks_and_reduces(p):
    matrix = problem("shared", n=5)[2]
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5).double()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = otkd.WassersteinLoss(matrix, p=p, temperature=2.0, reduction="none")
    cost = matrix.float().double() ** p if loss.cost.matrix.dtype == torch.float32 else matrix**p
    q, t = (x.div(2).softmax(-1).flatten(0, 1) for x in (student, teacher))
    expected = reference(q, t, cost).reshape(2, 3) * mask
    noisy = student.masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
    values = loss(noisy, teacher, mask=mask)
    close(values, expected, atol=1e-9, rtol=1e-9)
    values.sum().backward()
    assert noisy.grad.isfinite().all()
    assert noisy.grad[mask == 0].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"p": 0.0}, "p must be"), ({"p": float("nan")}, "p must be"), ({"p": -1.0}, "p must be")],
)
def test_refused_powers(options, message):
    a = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=message):
        ot.wasserstein(a, a, torch.eye(2), **options)
    with pytest.raises(ValueError, match=message):
        otkd.WassersteinLoss("ordinal", **options)


@pytest.mark.parametrize(
    ("error", "message", "a", "cost"),
    [
        (TypeError, "floating-point", [0.5, 0.5], torch.eye(2)),
        (ValueError, "add up to 1", torch.tensor([0.5, 0.6]), torch.eye(2)),
        (ValueError, "cost must have shape", torch.tensor([0.5, 0.5]), torch.ones(3, 2)),
        (ValueError, "finite", torch.tensor([0.5, 0.5]), torch.full((2, 2), torch.nan)),
        (ValueError, "needs one vocabulary", torch.tensor([0.5, 0.3, 0.2]), DiscreteCost()),
    ],
)
def test_refused_input(error, message, a, cost):
    with pytest.raises(error, match=message):
        ot.wasserstein(a, torch.tensor([0.5, 0.5]), cost)
