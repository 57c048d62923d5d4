"""KL that forgives near tokens: its limits, its laws, and the corners of its arithmetic."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import otkd
from otkd import costs, ot
from otkd import functional as F
from otkd.supports import Dense, TopK
from tests import naive
from tests.problems import logits, points

close = torch.testing.assert_close
seeds = st.integers(0, 10**6)
INF = math.inf
TIGHT = {"tolerance": 1e-11, "max_iterations": 2000}
PENALTIES = [(0.3, INF), (INF, 0.3), (0.7, 0.7), (0.2, 1.5), (2.0, 0.1), (INF, INF)]
KINDS = [
    {"smoothing": 1.0},
    {"smoothing": 0.6},
    {"smoothing": 0.1},
    {"smoothing": 0.6, "direction": "reverse"},
    {"smoothing": 0.1, "direction": "reverse"},
]
every_kind = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values()))
)


def pair(seed, vocab=7, positions=3, scale=2.0):
    return [logits(seed + i, positions, vocab, scale=scale) for i in range(2)]


def limit_of(rho, q, p):
    """The value for a cost that nothing pays, and ε → 0."""
    if rho == (INF, INF):
        raise ValueError("there is no such limit")
    if math.isinf(rho[1]):
        return rho[0] * (p * (p / q).log()).sum(-1)
    if math.isinf(rho[0]):
        return rho[1] * (q * (q / p).log()).sum(-1)
    share = rho[0] / sum(rho)
    return sum(rho) * (1 - (q**share * p ** (1 - share)).sum(-1))


# The limits of relaxed transport -----------------------------------------------------------------


@given(seeds, st.sampled_from(PENALTIES[:-1]))
def test_a_cost_that_nothing_pays_leaves_a_divergence(seed, rho):
    q, p = (x.softmax(-1) for x in pair(seed))
    cost = 100 * (1 - torch.eye(7, dtype=q.dtype))
    found = ot.sinkhorn(q, p, cost, epsilon=1e-3, marginal_relaxation=rho, tolerance=1e-9)
    # What is left is ε times an entropy.
    close(found.value, limit_of(rho, q, p), rtol=0, atol=1e-2)


@given(seeds)
def test_equal_penalties_leave_the_squared_hellinger_divergence(seed):
    student, teacher = pair(seed)
    cost = 100 * (1 - torch.eye(7, dtype=student.dtype))
    found = F.sinkhorn_divergence(
        student, teacher, cost=cost, epsilon=1e-3, marginal_relaxation=0.7, tolerance=1e-9
    )
    close(found, 0.7 * F.hellinger_divergence(student, teacher), rtol=0, atol=3e-3)


@given(seeds)
def test_the_discrete_cost_moves_from_kl_to_total_variation(seed):
    student, teacher = pair(seed)

    def value(rho, debias):
        return F.sinkhorn_divergence(
            student,
            teacher,
            cost=costs.DiscreteCost(),
            epsilon=1e-3,
            marginal_relaxation=(rho, None),
            debias=debias,
            tolerance=1e-9,
            max_iterations=1000,
        )

    close(value(1e-3, "teacher") / 2e-3, F.kl_divergence(student, teacher), rtol=1e-6, atol=1e-6)
    close(value(1e3, None), F.total_variation_distance(student, teacher), rtol=0, atol=1e-2)


@settings(max_examples=30)
@given(seeds, st.sampled_from(KINDS), st.sampled_from([1e4, 1e6]))
def test_the_limit_of_a_high_price_is_exactly_kl(seed, kind, price):
    student, teacher = pair(seed, scale=1.0)
    embedding = points(seed, 7, 3)
    found = F.transport_kl_divergence(
        student, teacher, cost=costs.EmbeddingCost(embedding), price=price, **kind, **TIGHT
    )
    reverse = kind.get("direction") == "reverse"
    expected = (F.reverse_kl_divergence if reverse else F.kl_divergence)(student, teacher)
    close(found, expected, rtol=1e-8, atol=1e-9)


@every_kind
def test_a_low_price_costs_little(kind):
    student, teacher = pair(3)
    cost = costs.EmbeddingCost(points(0, 7, 3))
    values = torch.stack(
        [
            F.transport_kl_divergence(student, teacher, cost=cost, price=price, **kind, **TIGHT)
            for price in (0.01, 0.1, 1.0, 10.0, 100.0)
        ]
    )
    assert (values.diff(dim=0) > 0).all()
    assert (values[0] < 0.05).all()


# A divergence ------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(seeds, st.sampled_from(PENALTIES), st.sampled_from([0.02, 0.3, 5.0]), st.booleans())
def test_the_distance_to_the_tangent_is_a_divergence(seed, rho, epsilon, signed):
    """For every pair of penalties and every symmetric cost, also one without a positive kernel."""
    q, p = (x.softmax(-1) for x in pair(seed))
    x = points(seed, 7, 2)
    cost = (x[:, None] - x).norm(dim=-1) ** (5.0 if signed else 1.0)
    options = {"epsilon": epsilon, "marginal_relaxation": rho, "debias": "teacher", **TIGHT}
    assert (ot.sinkhorn_divergence(q, p, cost, **options) >= -1e-9).all()
    same = p.clone().requires_grad_()
    value = ot.sinkhorn_divergence(same, p, cost, **options)
    (gradient,) = torch.autograd.grad(value.sum(), same)
    close(value, torch.zeros_like(value), rtol=0, atol=1e-9)
    slack = (gradient - gradient.mean(-1, keepdim=True)).abs().max()
    assert slack < 1e-6


def test_the_symmetric_debiasing_of_different_penalties_is_refused():
    """It is negative: half the entropies of the sides are subtracted, whatever they are worth."""
    q, p = (x.softmax(-1) for x in pair(0))
    cost = 1 - torch.eye(7, dtype=q.dtype)
    for rho in ((0.3, None), (None, 0.3), (0.3, 0.4)):
        with pytest.raises(ValueError, match="Use debias='teacher' or None"):
            ot.sinkhorn_divergence(q, p, cost, marginal_relaxation=rho)
        with pytest.raises(ValueError, match="Use debias='teacher' or None"):
            otkd.SinkhornLoss("discrete", marginal_relaxation=rho)


@pytest.mark.parametrize("rho", PENALTIES)
def test_the_definition(rho):
    q, p = (x.softmax(-1).requires_grad_() for x in pair(5))
    cost = (points(1, 7, 3)[:, None] - points(1, 7, 3)).norm(dim=-1)
    options = {"epsilon": 0.2, "marginal_relaxation": rho, **TIGHT}

    def transport(a, b):
        return ot.sinkhorn(a, b, cost, **options).value

    own = transport(p, p.detach())
    (slope,) = torch.autograd.grad(own.sum(), p)
    expected = transport(q, p.detach()) - own - (slope * (q - p)).sum(-1)
    found = ot.sinkhorn_divergence(q, p.detach(), cost, debias="teacher", **options)
    close(found, expected, rtol=0, atol=1e-8)


@every_kind
@pytest.mark.parametrize("support", [Dense(), TopK(3), TopK(2, clusters=2)], ids=str)
def test_gradients_are_those_of_differences(kind, support):
    student, teacher = pair(11)
    loss = otkd.TransportKLLoss(
        embedding=points(2, 7, 3), price=4.0, support=support, **kind, **TIGHT
    )
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher), student, atol=1e-6)


# The closed form ---------------------------------------------------------------------------------


@given(seeds, st.sampled_from([0.5, 5.0, 50.0]))
def test_without_a_penalty_there_is_nothing_to_iterate(seed, price):
    student, teacher = pair(seed)
    student.requires_grad_()
    loss = otkd.TransportKLLoss(embedding=points(seed, 7, 3), price=price, reduction="none")
    value = loss(student, teacher)
    assert loss.last_report.iterations == 1
    q, p = student.softmax(-1), teacher.softmax(-1)
    cost = loss.cost.matrices(7, 7, dtype=q.dtype, device=q.device, self_terms=False).cross
    kernel = torch.exp(-price * cost)

    def crossed(q):
        return -(p * (q @ kernel).log()).sum(-1)

    slope = -(p / (p @ kernel)) @ kernel
    expected = crossed(q) - crossed(p) - (slope * (q - p)).sum(-1)
    close(value, expected, rtol=1e-9, atol=1e-10)
    gradients = [torch.autograd.grad(v.sum(), student)[0] for v in (value, expected)]
    close(*gradients, rtol=1e-8, atol=1e-9)


def test_the_gradient_does_not_vanish_where_the_student_has_no_mass():
    """As that of KL, and unlike that of balanced transport."""
    student = torch.tensor([[-30.0, 0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[5.0, 0.0, 0.0]], dtype=torch.float64)
    embedding = torch.eye(3, dtype=torch.float64)
    slopes = {}
    for loss in (
        otkd.KLLoss(),
        otkd.TransportKLLoss(embedding=embedding, price=200.0),
        otkd.SinkhornLoss(embedding=embedding),
    ):
        z = student.clone().requires_grad_()
        loss(z, teacher).backward()
        slopes[type(loss)] = z.grad[0, 0].item()
    assert slopes[otkd.TransportKLLoss] == pytest.approx(slopes[otkd.KLLoss], rel=1e-6)
    assert slopes[otkd.KLLoss] < -0.9
    assert abs(slopes[otkd.SinkhornLoss]) < 1e-9


@pytest.mark.parametrize("price", [1.0, 3.0, 10.0])
def test_a_token_costs_at_most_what_moving_its_mass_costs(price):
    student = torch.tensor([[-60.0, 0.0, -60.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, -30.0, -30.0]], dtype=torch.float64)
    loss = otkd.TransportKLLoss("discrete", price=price, smoothing=0.01)
    value = loss(student, teacher)
    (slope,) = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(price, rel=0.02)
    assert slope.abs().max() < 1e-4


def test_debiasing_forgives_a_little_mass_where_the_teacher_has_none():
    teacher = torch.full((1, 101), -15.0, dtype=torch.float64)
    teacher[0, 0] = 0
    student = torch.full((1, 101), math.log(0.001), dtype=torch.float64)
    student[0, 0] = math.log(0.9)
    student.requires_grad_()
    slopes = {}
    for debias in ("teacher", None):
        loss = otkd.TransportKLLoss("discrete", price=10.0, debias=debias)
        (slopes[debias],) = torch.autograd.grad(loss(student, teacher), student)
    kl = otkd.KLLoss()(student, teacher)
    (expected,) = torch.autograd.grad(kl, student)
    value = otkd.TransportKLLoss("discrete", price=10.0)(student, teacher)
    assert value.item() == pytest.approx(0.0055, abs=0.0005)
    assert kl.item() == pytest.approx(0.105, abs=0.001)
    assert slopes["teacher"][0, 1] < 0.15 * expected[0, 1]
    assert slopes[None][0, 1] == pytest.approx(expected[0, 1], rel=0.01)


@pytest.mark.parametrize(("price", "smoothing"), [(3.0, 0.6), (10.0, 0.1), (20.0, 0.1)])
def test_the_reverse_direction_forgives_what_moving_costs_less(price, smoothing):
    student = torch.tensor([[-60.0, 0.0, -60.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, -30.0, -30.0]], dtype=torch.float64)
    loss = otkd.TransportKLLoss(
        "discrete", price=price, smoothing=smoothing, direction="reverse", **TIGHT
    )
    expected = max(0.0, price - smoothing * 30) / (1 - smoothing)
    assert loss(student, teacher).item() == pytest.approx(expected, abs=0.05)


# Corners of the arithmetic -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("price", "gap"), [(3.0, 30.0), (3.0, 120.0), (3.0, 1e4), (300.0, 30.0), (300.0, 1e4)]
)
@pytest.mark.parametrize("support", [Dense(), TopK(4)], ids=str)
@every_kind
def test_float32_agrees_with_float64_where_masses_underflow(kind, support, price, gap):
    student, teacher = pair(21, vocab=9, positions=4)
    student[0, 2] -= gap
    student[1, 3] += gap
    teacher[2, 4] -= gap
    teacher[3, 5] += gap
    embedding = points(4, 9, 3)
    found = []
    for dtype, limits in (
        (torch.float64, {"tolerance": 1e-9, "max_iterations": 2000}),
        (torch.float32, {"tolerance": 1e-4, "max_iterations": 200}),
    ):
        z = student.to(dtype).requires_grad_()
        loss = otkd.TransportKLLoss(
            embedding=embedding, price=price, support=support, reduction="none", **kind, **limits
        )
        value = loss(z, teacher.to(dtype))
        assert loss.last_report.converged
        (slope,) = torch.autograd.grad(value.sum(), z)
        found.append((value.double(), slope.double()))
    (exact, exact_slope), (value, slope) = found
    close(value, exact, rtol=2e-3, atol=2e-3)
    close(slope, exact_slope, rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("epsilon", "rho"), [*itertools.product([0.005, 0.1], [(1e-3, INF), (1e-3, 1e-3), (INF, 1e-3)])]
)
def test_small_penalties_and_tiny_masses_converge_in_float32(epsilon, rho):
    student, teacher = (x.float() for x in pair(31, vocab=40, positions=5))
    student[:, 0] -= 69  # q = 1e-30
    loss = otkd.SinkhornLoss(
        embedding=points(1, 40, 3), epsilon=epsilon, marginal_relaxation=rho, debias="teacher"
    )
    z = student.requires_grad_()
    value = loss(z, teacher)
    assert loss.last_report.converged
    assert value > 0
    value.backward()
    assert z.grad.isfinite().all()


# Two vocabularies --------------------------------------------------------------------------------


@every_kind
def test_between_two_vocabularies_it_is_not_debiased(kind):
    student, teacher = logits(1, 3, 7), logits(2, 3, 5)
    cost = costs.EmbeddingCost(points(1, 7, 3), points(2, 5, 3))
    loss = otkd.TransportKLLoss(cost, price=5.0, reduction="none", **kind, **TIGHT)
    reverse = kind.get("direction") == "reverse"
    epsilon, rho = kind["smoothing"] / 5, (1 - kind["smoothing"]) / 5
    q, p = student.softmax(-1), teacher.softmax(-1)
    matrix = cost.matrices(7, 5, dtype=q.dtype, device=q.device, self_terms=False).cross
    value = loss(student, teacher)
    if rho == 0:
        close(value, -(p * (q @ torch.exp(-5 * matrix)).log()).sum(-1), rtol=1e-9, atol=1e-9)
        return
    penalties = (INF, rho) if reverse else (rho, INF)
    whole = ot.sinkhorn(q, p, matrix, epsilon=epsilon, marginal_relaxation=penalties, **TIGHT)
    close(value, whole.value * (1 / rho if reverse else 5), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="debias='teacher' requires one vocabulary"):
        otkd.TransportKLLoss(cost, debias="teacher", **kind)(student, teacher)


@every_kind
def test_an_explanation_has_the_value_of_the_loss(kind):
    student, teacher = pair(13, positions=1)
    loss = otkd.TransportKLLoss(embedding=points(3, 7, 3), price=5.0, **kind, **TIGHT)
    assert loss.explain(student, teacher).value == pytest.approx(loss(student, teacher).item())


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"price": 0.0}, ValueError, "price must be a finite number above 0"),
        ({"price": INF}, ValueError, "price must be a finite number above 0"),
        ({"price": 1e10}, ValueError, r"price must be at most 1e\+09"),
        ({"smoothing": 0.0}, ValueError, "smoothing must be a finite number above 0"),
        ({"smoothing": 1.5}, ValueError, "smoothing must be at most 1"),
        ({"direction": "backward"}, ValueError, "direction must be one of 'forward'"),
        ({"direction": "reverse"}, ValueError, "requires smoothing below 1"),
        ({"debias": "sinkhorn"}, ValueError, "debias must be one of 'auto', 'teacher'"),
        ({"debias": True}, ValueError, "debias must be"),
        ({"epsilon": 0.1}, TypeError, "no argument 'epsilon'"),
    ],
)
def test_refused_settings(options, error, message):
    with pytest.raises(error, match=message):
        otkd.TransportKLLoss("discrete", **options)


def test_a_learnable_cost_and_a_differentiable_teacher_are_refused():
    student, teacher = pair(1)
    cost = costs.EmbeddingCost(torch.nn.Parameter(points(1, 7, 3)), learnable=True)
    with pytest.raises(ValueError, match="requires a constant cost"):
        otkd.TransportKLLoss(cost)(student, teacher)
    q, p = student.softmax(-1), teacher.softmax(-1).requires_grad_()
    with pytest.raises(ValueError, match="not differentiable in the target masses"):
        ot.sinkhorn_divergence(q, p, 1 - torch.eye(7, dtype=q.dtype), debias="teacher")


def test_the_old_name_of_marginal_relaxation():
    student, teacher = pair(1)
    with pytest.warns(DeprecationWarning, match="marginal_relaxation="):
        old = otkd.SinkhornLoss("discrete", unbalanced=0.5)
    with pytest.warns(DeprecationWarning, match="marginal_relaxation="):
        value = F.sinkhorn_divergence(student, teacher, cost=costs.DiscreteCost(), unbalanced=0.5)
    new = otkd.SinkhornLoss("discrete", marginal_relaxation=0.5, reduction="none")
    close(value, new(student, teacher))
    close(old(student, teacher), value.mean())
    with pytest.raises(TypeError, match="pass one of them"):
        otkd.SinkhornLoss("discrete", unbalanced=0.5, marginal_relaxation=0.5)


def test_the_value_is_that_of_plain_iterations():
    q, p = (x.softmax(-1)[0] for x in pair(41))
    cost = (points(1, 7, 3)[:, None] - points(1, 7, 3)).norm(dim=-1)
    for rho in PENALTIES[:-1]:
        expected = naive.unbalanced_sinkhorn(q[None], p[None], cost, 0.3, rho, iterations=3000)[0]
        found = ot.sinkhorn(q, p, cost, epsilon=0.3, marginal_relaxation=rho, **TIGHT)
        close(found.value, expected[0], rtol=1e-8, atol=1e-9)
