import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.autograd import gradcheck

import otkd
from otkd import functional as F
from otkd.functional import l1_distances as l1
from tests import naive
from tests.problems import logits, seeds

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close

COSTS = ("l1", "euclidean", "sqeuclidean")
EXACT = {"tolerance": 1e-12, "max_iterations": 20_000}
ROUGH = {"tolerance": 1e-3, "max_iterations": 20_000}  # at small ε more takes very long
VARIANTS = [
    {"value": value, "debias": debias}
    for value, debias in itertools.product(("dual", "sharp"), (False, True))
]


def distances(x, y, cost):
    """Pair by pair, with a zero gradient where two points coincide."""
    difference = x.unsqueeze(-2) - y.unsqueeze(-3)
    if cost == "l1":
        return difference.abs().sum(-1)
    squares = difference.square().sum(-1)
    if cost == "sqeuclidean":
        return squares
    apart = squares > 0
    return torch.where(apart, squares.where(apart, 1.0).sqrt(), 0.0)


def unrolled(student, teacher, *, cost, epsilon, value, debias, temperature=2.0):
    q, p = (torch.softmax(z / temperature, -1) for z in (student, teacher))
    uniform = torch.full(q.shape[:-1], 1 / q.shape[-2], dtype=q.dtype)
    pairs = ((q, p), (q, q), (p, p))
    matrices = [distances(x, y, cost) for x, y in pairs]
    sharp = value == "sharp"
    return naive.divergence(
        uniform, uniform, matrices, epsilon, sharp=sharp, debias=debias, iterations=2000
    )


def with_gradient(function, student):
    leaf = student.detach().clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


# The published arithmetic ------------------------------------------------------------------------


def published(student, teacher, labels, alpha, temperature, sinkhorn_weight=0.8):
    """TARGETS: α·soft cross-entropy + (1 − α)·CE + 0.8·S."""
    soft = -(
        torch.softmax(teacher / temperature, -1) * torch.log_softmax(student / temperature, -1)
    )
    hard = -torch.log_softmax(student, -1)[torch.arange(len(labels)), labels]
    x, y = torch.softmax(student / 2, -1), torch.softmax(teacher / 2, -1)
    cost = torch.stack([torch.stack([(u - v).abs().sum() for v in y]) for u in x])
    plan = torch.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(1)[:, None]
        plan = plan / plan.sum(0)[None, :]
    transport = 0.001 * (plan * cost).sum()
    return alpha * soft.sum(-1).mean() + (1 - alpha) * hard.mean() + sinkhorn_weight * transport


@pytest.mark.parametrize(("classes", "samples"), [(2, 16), (3, 7), (2, 1)])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 1.0), (0.8, 3.0), (1.0, 4.0)])
def test_author_is_the_published_arithmetic(classes, samples, alpha, temperature):
    student, teacher = logits(1, samples, classes), logits(2, samples, classes)
    labels = torch.arange(samples) % classes
    loss = otkd.SinKDLoss.author(alpha, temperature=temperature)
    value, gradient = with_gradient(lambda z: loss(z, teacher, labels=labels), student)
    expected, slope = with_gradient(
        lambda z: published(z, teacher, labels, alpha, temperature), student
    )
    close(value, expected, rtol=1e-6, atol=1e-9)
    close(gradient, slope, rtol=1e-6, atol=1e-9)
    single, _ = with_gradient(lambda z: loss(z, teacher.float(), labels=labels), student.float())
    close(single.double(), expected, rtol=1e-5, atol=1e-6)
    assert set(loss.last_terms) == {"kl", "ce", "sinkhorn"}


def test_author_weighs_its_transport_and_leaves_out_padding():
    student, teacher = logits(1, 6, 3), logits(2, 6, 3)
    labels = torch.tensor([0, 1, -100, 2, 0, -100])
    loss = otkd.SinKDLoss.author(0.9, 50.0)
    value, gradient = with_gradient(lambda z: loss(z, teacher, labels=labels), student)
    kept = labels != -100
    expected, slope = with_gradient(
        lambda z: published(z[kept], teacher[kept], labels[kept], 0.9, 1.0, 50.0), student
    )
    close(value, expected, rtol=1e-6, atol=1e-9)
    close(gradient, slope, rtol=1e-6, atol=1e-9)


# Known values ------------------------------------------------------------------------------------


@given(seed=seeds, samples=st.integers(1, 7), cost=st.sampled_from(COSTS))
def test_small_epsilon_gives_the_best_matching(seed, samples, cost):
    """Exactly: the entropic value exceeds the matching by at most ε·log b."""
    student, teacher = logits(seed, samples, 4), logits(seed + 1, samples, 4)
    matrix = distances(student.softmax(-1), teacher.softmax(-1), cost)
    rows, columns = linear_sum_assignment(matrix.numpy())
    matching = matrix[rows, columns].mean()
    slack = ROUGH["tolerance"] * matrix.max()
    for epsilon in (0.1, 0.01):
        value = F.batch_sinkhorn_distance(
            student, teacher, temperature=1.0, cost=cost, epsilon=epsilon, debias=False, **ROUGH
        )
        assert matching - slack <= value <= matching + epsilon * math.log(samples) + 1e-9


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("value", ["dual", "sharp"])
def test_a_matching_far_better_than_any_other_is_found_with_its_gradient(cost, value):
    teacher = 4 * torch.eye(5, dtype=torch.float64)
    order = torch.randperm(5)
    student = teacher[order] + logits(1, 5, 5, scale=0.7)
    settings = {"temperature": 1.0, "epsilon": 0.02, "debias": False}
    loss = otkd.BatchSinkhornLoss(cost, value=value, **settings, **EXACT)
    result, gradient = with_gradient(lambda z: loss(z, teacher), student)
    rows = torch.arange(5)
    matching, slope = with_gradient(
        lambda z: distances(z.softmax(-1), teacher.softmax(-1), cost)[rows, order].mean(), student
    )
    close(gradient, slope, rtol=1e-4, atol=1e-6)
    entropy = 0.02 * math.log(5) if value == "dual" else 0.0
    close(result, matching + entropy, rtol=0, atol=1e-6)


@given(seed=seeds, samples=st.integers(1, 9))
def test_two_classes_are_matched_in_their_order(seed, samples):
    student, teacher = logits(seed, samples, 2), logits(seed + 1, samples, 2)
    q, p = (z.softmax(-1)[:, 0].sort().values for z in (student, teacher))
    sorted_matching = 2 * (q - p).abs().mean()
    for epsilon in (0.1, 0.02):
        value = F.batch_sinkhorn_distance(
            student, teacher, temperature=1.0, epsilon=epsilon, debias=False, **ROUGH
        )
        assert sorted_matching - 2e-3 <= value
        assert value <= sorted_matching + epsilon * math.log(samples) + 1e-9


def test_one_sample_is_twice_the_total_variation_distance():
    student, teacher = logits(1, 1, 5), logits(2, 1, 5)
    for epsilon, value in itertools.product((0.01, 0.1, 10.0), ("dual", "sharp")):
        loss = otkd.BatchSinkhornLoss(temperature=1.0, epsilon=epsilon, value=value)
        ours = with_gradient(lambda z, loss=loss: loss(z, teacher), student)
        tvd = with_gradient(lambda z: 2 * F.total_variation_distance(z, teacher)[0], student)
        for x, y in zip(ours, tvd, strict=True):
            close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("cost", COSTS)
def test_value_and_gradient_are_those_of_unrolled_iterations(cost, options):
    settings = {"cost": cost, "epsilon": 0.1, **options}
    student, teacher = logits(1, 5, 4), logits(2, 5, 4)
    loss = otkd.BatchSinkhornLoss(**settings, **EXACT)
    value, gradient = with_gradient(lambda z: loss(z, teacher), student)
    expected, slope = with_gradient(lambda z: unrolled(z, teacher, **settings), student)
    close(value, expected, rtol=1e-8, atol=1e-9)
    close(gradient, slope, rtol=1e-7, atol=1e-9)
    single = otkd.BatchSinkhornLoss(**settings, tolerance=1e-6)
    value, gradient = with_gradient(lambda z: single(z, teacher), student.float())
    close(value.double(), expected, rtol=1e-4, atol=1e-5)
    close(gradient.double(), slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("cost", COSTS)
def test_gradcheck(cost, options):
    teacher = logits(2, 4, 3, scale=1)
    loss = otkd.BatchSinkhornLoss(cost, epsilon=0.2, **options, **EXACT)
    assert gradcheck(lambda z: loss(z, teacher), logits(1, 4, 3, scale=1).requires_grad_())


@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("samples", [1, 6, 60])
def test_debiased_is_zero_at_equal_sets(value, cost, dtype, samples):
    """And neither NaN nor steep, though every sample meets itself at a distance of 0."""
    teacher = logits(1, samples, 5, dtype=dtype)
    order = torch.randperm(samples)
    tolerance, error = (1e-12, 1e-10) if dtype == torch.float64 else (1e-5, 1e-4)
    settings = {"value": value, "tolerance": tolerance, "max_iterations": 20_000}
    loss = otkd.BatchSinkhornLoss(cost, debias=True, **settings)
    result, gradient = with_gradient(lambda z: loss(z, teacher), teacher[order])
    assert abs(result.item()) < error
    assert gradient.abs().max() < error
    other, _ = with_gradient(lambda z: loss(z, teacher), teacher + logits(2, samples, 5).to(dtype))
    assert other > 1e-3


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("debias", [False, True])
def test_finite_where_samples_coincide(cost, debias):
    student = torch.zeros(40, 3)
    student[20:, 0] = 200.0
    loss = otkd.BatchSinkhornLoss(cost, debias=debias)
    for teacher in (student, torch.zeros(40, 3)):
        value, gradient = with_gradient(lambda z, t=teacher: loss(z, t), student)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("samples", [30, 100])
def test_many_samples_in_float32(cost, samples):
    student, teacher = logits(1, samples, 3), logits(2, samples, 3)
    loss = otkd.BatchSinkhornLoss(cost, debias=True, tolerance=1e-5)
    exact = with_gradient(lambda z: loss(z, teacher), student)
    single = with_gradient(lambda z: loss(z, teacher.float()), student.float())
    close(single[0].double(), exact[0], rtol=1e-3, atol=1e-5)
    close(single[1].double(), exact[1], rtol=1e-2, atol=1e-6)


# Batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS)
@given(seed=seeds, cost=st.sampled_from(COSTS))
def test_the_order_of_the_samples_does_not_matter(seed, cost, options):
    student, teacher = logits(seed, 5, 3), logits(seed + 1, 5, 3)
    order = torch.randperm(5)
    loss = otkd.BatchSinkhornLoss(cost, reduction="none", **options, **EXACT)
    shares, gradient = with_gradient(lambda z: loss(z, teacher), student)
    permuted, slope = with_gradient(lambda z: loss(z, teacher), student[order])
    moved_teacher, same_slope = with_gradient(lambda z: loss(z, teacher[order]), student)
    close(permuted.sum(), shares.sum(), rtol=1e-7, atol=1e-8)
    close(moved_teacher.sum(), shares.sum(), rtol=1e-7, atol=1e-8)
    close(slope, gradient[order], rtol=1e-6, atol=1e-7)
    close(same_slope, gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("cost", COSTS)
def test_shares_add_up_to_b_times_the_mean(cost, options):
    student, teacher = logits(1, 3, 4, 5), logits(2, 3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]])
    counted = mask.sum().item()
    settings = {"cost": cost, "max_iterations": 3, "tolerance": 10.0, **options}  # far from solved
    mean, slope = with_gradient(
        lambda z: otkd.BatchSinkhornLoss(**settings)(z, teacher, mask=mask), student
    )
    shares, gradient = with_gradient(
        lambda z: otkd.BatchSinkhornLoss(reduction="none", **settings)(z, teacher, mask=mask),
        student,
    )
    assert shares.shape == mask.shape
    assert (shares[mask == 0] == 0).all()
    close(shares.sum(), counted * mean)
    close(gradient, counted * slope)
    total, _ = with_gradient(
        lambda z: otkd.BatchSinkhornLoss(reduction="sum", **settings)(z, teacher, mask=mask),
        student,
    )
    close(total, counted * mean)
    scaled, flat = with_gradient(
        lambda z: otkd.BatchSinkhornLoss(**settings)(
            z, teacher, mask=mask, num_items_in_batch=torch.tensor(32)
        ),
        student,
    )
    close(scaled, mean * counted / 32)
    close(flat, slope * counted / 32)


def test_shares_are_larger_where_the_student_is_further_off():
    teacher = logits(1, 6, 4)
    student = teacher.clone()
    student[2] = teacher[2].flip(-1) * 3
    for options in VARIANTS:
        loss = otkd.BatchSinkhornLoss(reduction="none", **options, **EXACT)
        assert loss(student, teacher).argmax() == 2


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("cost", COSTS)
def test_the_loss_is_the_function_of_all_counted_positions(cost, options):
    student, teacher = logits(1, 3, 4, 5), logits(2, 3, 4, 5)
    mask = torch.arange(12).reshape(3, 4) % 5 != 1
    settings = {"cost": cost, "epsilon": 0.2, **options, **EXACT}
    loss = otkd.BatchSinkhornLoss(temperature=1.5, teacher_temperature=0.5, **settings)
    value, gradient = with_gradient(lambda z: loss(z, teacher, mask=mask), student)
    expected, slope = with_gradient(
        lambda z: F.batch_sinkhorn_distance(
            z[mask], teacher[mask], temperature=1.5, teacher_temperature=0.5, **settings
        ),
        student,
    )
    close(value, expected)
    close(gradient, slope)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("cost", COSTS)
def test_batches_of_batches(cost, options):
    student, teacher = logits(1, 2, 3, 5, 4), logits(2, 2, 3, 5, 4)
    settings = {"cost": cost, **options, **EXACT}
    value, gradient = with_gradient(
        lambda z: F.batch_sinkhorn_distance(z, teacher, **settings), student
    )
    assert value.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        one, slope = with_gradient(
            lambda z, t=teacher[i, j]: F.batch_sinkhorn_distance(z, t, **settings), student[i, j]
        )
        close(value[i, j], one, rtol=1e-8, atol=1e-9)
        close(gradient[i, j], slope, rtol=1e-7, atol=1e-9)
    empty = F.batch_sinkhorn_distance(student[:0], teacher[:0], **settings)
    assert empty.shape == (0, 3)


def test_the_teacher_is_a_constant_and_may_be_of_another_precision():
    student, teacher = logits(1, 5, 4).requires_grad_(), logits(2, 5, 4).requires_grad_()
    F.batch_sinkhorn_distance(student, teacher).backward()
    assert teacher.grad is None
    half = F.batch_sinkhorn_distance(student.bfloat16(), teacher.float())
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4,), {}, "needs samples in dimension −2"),
        ((0, 4), {}, "at least one sample"),
        ((3, 4), {"cost": "cosine"}, "cost must be one of"),
        ((3, 4), {"epsilon": 0.0}, "epsilon must be"),
        ((3, 4), {"temperature": -1.0}, "temperature must be"),
        ((3, 4), {"value": "primal"}, "value must be one of"),
    ],
)
def test_refused_input(shape, options, message):
    with pytest.raises(ValueError, match=message):
        F.batch_sinkhorn_distance(torch.ones(shape), torch.ones(shape), **options)
    with pytest.raises(ValueError, match="the student has 4 tokens and the teacher 5"):
        F.batch_sinkhorn_distance(torch.ones(3, 4), torch.ones(3, 5))


# What it costs to leave one's sample --------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
def test_sample_cost_leads_from_the_batch_to_the_sample(cost):
    student, teacher = logits(1, 8, 3), logits(2, 8, 3)
    q, p = (torch.softmax(z / 2, -1) for z in (student, teacher))
    own = distances(q, p, cost).diagonal().mean()
    options = {"cost": cost, "epsilon": 0.01, "value": "sharp", **ROUGH}
    values = [
        F.batch_sinkhorn_distance(student, teacher, sample_cost=c, **options) for c in (0, 0.1, 9)
    ]
    assert values[0] < values[1] < values[2]
    close(values[2], own)


@pytest.mark.parametrize("debias", [False, True])
def test_sample_cost_is_part_of_the_ground_cost(debias):
    student, teacher = logits(1, 6, 3).requires_grad_(), logits(2, 6, 3)
    q, p = (torch.softmax(z / 2, -1) for z in (student, teacher))
    apart = 0.3 * (1 - torch.eye(6, dtype=torch.float64))
    matrices = [distances(x, y, "sqeuclidean") + apart for x, y in ((q, p), (q, q), (p, p))]
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    expected = naive.divergence(uniform, uniform, matrices, 0.1, debias=debias, iterations=2000)
    loss = otkd.BatchSinkhornLoss("sqeuclidean", sample_cost=0.3, debias=debias, **EXACT)
    value = loss(student, teacher)
    close(value, expected)
    (found,), (wanted,) = (torch.autograd.grad(x, student) for x in (value, expected))
    close(found, wanted)
    if debias:
        # Only the same samples agree now: another order is another batch.
        assert loss(teacher, teacher).abs() < 1e-10
        assert loss(teacher.roll(1, 0), teacher) > 0.01


def test_sample_cost_must_not_be_negative():
    with pytest.raises(ValueError, match="sample_cost must be a finite number of at least 0"):
        otkd.BatchSinkhornLoss(sample_cost=-1)


# L1 distances by tiles ----------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [700, 5_000, 2**20])
@pytest.mark.parametrize("width", [1, 3, 6, 256, 300])
def test_tiles_give_the_distances_and_gradients_of_cdist(monkeypatch, tile, width):
    monkeypatch.setattr(l1, "_TILE", tile if width > 6 else tile // 100)
    monkeypatch.setattr(l1, "_SPAN", 128)
    monkeypatch.setattr(l1, "_FEW_PAIRS", 1)
    x, y = (logits(seed, n, width).requires_grad_() for seed, n in ((1, 9), (2, 7)))
    weights = logits(3, 9, 7)
    found, expected = l1.l1_distances(x, y), torch.cdist(x, y, p=1)
    assert type(found.grad_fn).__name__ != type(expected.grad_fn).__name__
    close(found, expected)
    for leaves in ((x, y), (x,), (y,)):
        ours, theirs = (
            torch.autograd.grad((d * weights).sum(), leaves, retain_graph=True)
            for d in (found, expected)
        )
        close(ours, theirs)
    # A constant teacher takes no gradient; equal coordinates give none.
    same = l1.l1_distances(x, x.detach())
    close(same, torch.cdist(x, x, p=1).detach(), atol=1e-12, rtol=1e-12)
    (gradient,) = torch.autograd.grad(same.diagonal().sum(), x)
    assert gradient.abs().max() == 0
