"""Transport between the heads of both distributions and one atom for all other tokens."""

import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import otkd
from otkd import functional as F
from otkd.costs import DiscreteCost, EmbeddingCost, MatrixCost, OrdinalCost, PowerCost
from otkd.supports import CoverageWarning, Dense, TopK
from otkd.supports.heads import top_tokens
from tests import naive
from tests.problems import logits, points, seeds, self_costs

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
TIGHT = {"tolerance": 1e-10, "max_iterations": 20_000}
VOCAB, EPSILON = 9, 0.5
METRICS = ("sqeuclidean", "euclidean", "cosine")
F64 = torch.float64


def one_vocabulary(name: str):
    """A cost object, and the same cost as a matrix by independent means."""
    x = points(1, VOCAB, 3)
    gaps = (torch.arange(VOCAB)[:, None] - torch.arange(VOCAB)).abs().double()
    if name in METRICS:
        matrix = naive.embedding_cost(x, x, name)
        return EmbeddingCost(x, metric=name), matrix / matrix.mean()
    if name == "power":
        matrix = naive.embedding_cost(x, x, "euclidean")
        return PowerCost(EmbeddingCost(x, metric="euclidean"), 0.5), (matrix / matrix.mean()) ** 0.5
    return {
        "discrete": (DiscreteCost(), (gaps > 0).double()),
        "ordinal": (OrdinalCost(0.5), gaps**0.5),
        "matrix": (MatrixCost(self_costs(3, VOCAB)["l1"]), self_costs(3, VOCAB)["l1"]),
    }[name]


COSTS = (*METRICS, "discrete", "ordinal", "matrix", "power")


def slopes(function, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def loss_of(cost="discrete", k=2, tail=True, **options):
    options = {"epsilon": EPSILON, "reduction": "none", **TIGHT, **options}
    return otkd.SinkhornLoss(cost, support=TopK(k, tail=tail), **options)


# Against the reference ---------------------------------------------------------------------------


def check_against_reference(cost, costs, student, teacher, k, *, tail=True, **options):
    temperature = options.pop("temperature", 1.0)
    teacher_temperature = options.pop("teacher_temperature", temperature)
    unbalanced, value = options.pop("marginal_relaxation", None), options.pop("value", "dual")
    debias = options.pop("debias", True)

    def solved(z):
        return F.sinkhorn_divergence(
            z,
            teacher,
            cost=cost,
            epsilon=EPSILON,
            support=TopK(k, tail=tail),
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            debias=debias,
            value=value,
            marginal_relaxation=unbalanced,
            **TIGHT,
        )

    def reference(z):
        return naive.topk_divergence(
            naive.log_distribution(z, temperature).exp(),
            naive.log_distribution(teacher, teacher_temperature).exp(),
            costs,
            k,
            EPSILON,
            shared=cost.one_vocabulary,
            tail=tail,
            rho=unbalanced,
            sharp=value == "sharp",
            debias=debias,
            iterations=150,
        )

    for left, right in zip(slopes(solved, student), slopes(reference, student), strict=True):
        close(left, right, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("tail", [True, False])
def test_value_and_gradient_are_those_of_the_reference(name, tail):
    cost, matrix = one_vocabulary(name)
    student, teacher = logits(1, 2, VOCAB), logits(2, 2, VOCAB)
    check_against_reference(cost, (matrix,) * 3, student, teacher, 2, tail=tail)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"debias": False},
        {"value": "sharp"},
        {"value": "sharp", "debias": False},
        {"marginal_relaxation": 1.0},
        {"marginal_relaxation": 0.3, "debias": False},
        {"temperature": 2.0, "teacher_temperature": 0.8},
    ],
)
def test_every_variant_is_that_of_the_reference(tail, options):
    cost, matrix = one_vocabulary("sqeuclidean")
    student, teacher = logits(3, 2, VOCAB), logits(4, 2, VOCAB)
    check_against_reference(cost, (matrix,) * 3, student, teacher, 2, tail=tail, **options)


@pytest.mark.parametrize("tail", [True, False])
def test_a_cost_that_is_not_symmetric(tail):
    matrix = torch.rand(VOCAB, VOCAB, dtype=F64)
    student, teacher = logits(3, 2, VOCAB), logits(4, 2, VOCAB)
    options = {"tail": tail, "debias": False}
    check_against_reference(MatrixCost(matrix), (matrix,) * 3, student, teacher, 2, **options)
    hollow = matrix.clone().fill_diagonal_(0)
    skewed, thick = (hollow, "square and symmetric"), (matrix + matrix.mT, "0 on its diagonal")
    for cost, message in (skewed, thick):
        with pytest.raises(ValueError, match=f"a self-cost must be {message}"):
            F.sinkhorn_divergence(student, teacher, cost=cost, support=TopK(2, tail=tail))


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [2, 5])
def test_two_vocabularies_have_a_head_each(tail, metric, k):
    source, target = points(1, 5, 3), points(2, 8, 3)  # k = 5 leaves the source without a tail
    pairs = ((source, target), (source, source), (target, target))
    costs = [naive.embedding_cost(x, y, metric) for x, y in pairs]
    costs = tuple(cost / costs[0].mean() for cost in costs)
    cost = EmbeddingCost(source, target, metric=metric)
    check_against_reference(cost, costs, logits(1, 2, 5), logits(2, 2, 8), k, tail=tail)


def test_two_vocabularies_of_one_size_are_not_one():
    source, target = points(1, 6, 3), points(2, 6, 3)
    pairs = ((source, target), (source, source), (target, target))
    costs = [naive.embedding_cost(x, y, "sqeuclidean") for x, y in pairs]
    costs = tuple(cost / costs[0].mean() for cost in costs)
    check_against_reference(
        EmbeddingCost(source, target), costs, *(logits(s, 2, 6) for s in (1, 2)), 2
    )


def test_a_matrix_between_two_vocabularies_says_nothing_of_either():
    matrix = torch.rand(5, 8, dtype=F64)
    student, teacher = logits(1, 2, 5), logits(2, 2, 8)
    options = {"debias": False}
    check_against_reference(MatrixCost(matrix), (matrix,), student, teacher, 2, **options)
    with pytest.raises(ValueError, match="needs the cost within each side"):
        F.sinkhorn_divergence(student, teacher, cost=matrix, support=TopK(2))


@pytest.mark.parametrize("vocab", [64, 75])
def test_a_vocabulary_large_enough_to_be_searched_in_groups(vocab):
    x = points(1, vocab, 3)
    matrix = naive.embedding_cost(x, x, "sqeuclidean")
    student, teacher = logits(1, 2, vocab), logits(2, 2, vocab)
    student[1, 5:] = -30
    check_against_reference(
        EmbeddingCost(x), (matrix / matrix.mean(),) * 3, student, teacher, 2, debias=False
    )
    for bad in (torch.nan, torch.inf):
        broken = teacher.clone()
        broken[1, vocab - 1] = bad
        with pytest.raises(ValueError, match="1 of 2 positions have teacher_logits"):
            loss_of()(student, broken)


@given(seed=seeds, vocab=st.integers(1, 200), k=st.integers(1, 12), kind=st.integers(0, 2))
def test_the_heaviest_tokens_are_those_of_a_sort(seed, vocab, k, kind):
    rows = logits(seed, 3, vocab)
    if kind == 1:  # ties
        rows = rows.round()
    if kind == 2:  # few that have mass
        rows = rows.masked_fill(rows < 2, -torch.inf)
    tokens = top_tokens(rows, k)
    assert tokens.shape == (3, min(k, vocab))
    for row, chosen in zip(rows, tokens, strict=True):
        assert len(set(chosen.tolist())) == len(chosen)
        close(row[chosen].sort().values, row.sort().values[-len(chosen) :], rtol=0, atol=0)


# Laws --------------------------------------------------------------------------------------------


@given(
    seed=seeds,
    name=st.sampled_from(["sqeuclidean", "discrete", "ordinal"]),
    k=st.integers(1, VOCAB),
    tail=st.booleans(),
    unbalanced=st.sampled_from([None, 1.0]),
)
def test_laws_of_the_divergence(seed, name, k, tail, unbalanced):
    loss = loss_of(one_vocabulary(name)[0], k, tail, marginal_relaxation=unbalanced)
    student, teacher = logits(seed, 3, VOCAB), logits(seed + 1, 3, VOCAB)
    value, gradient = slopes(lambda z: loss(z, teacher), student)
    close(gradient.sum(-1), torch.zeros(3, dtype=F64), atol=1e-9, rtol=0)
    close(loss(teacher, student), value, atol=1e-8, rtol=1e-6)
    shifted = slopes(lambda z: loss(z, teacher - 3), student + 20)
    close(shifted[0], value, atol=1e-8, rtol=1e-6)
    close(shifted[1], gradient, atol=1e-8, rtol=1e-6)
    same, flat = slopes(lambda z: loss(z, teacher), teacher)
    close(same, torch.zeros_like(same), atol=1e-9, rtol=0)
    close(flat, torch.zeros_like(flat), atol=1e-7, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_equivariance_to_a_permutation_of_the_vocabulary_with_its_embedding(metric):
    embedding, order = points(1, VOCAB, 4), torch.randperm(VOCAB)
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    plain = loss_of(EmbeddingCost(embedding, metric=metric))
    moved = loss_of(EmbeddingCost(embedding[order], metric=metric))
    value, gradient = slopes(lambda z: plain(z, teacher), student)
    other = slopes(lambda z: moved(z, teacher[:, order]), student[:, order])
    close(other[0], value, atol=1e-8, rtol=1e-6)
    close(other[1], gradient[:, order], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("k", [VOCAB, VOCAB + 5])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("value", ["dual", "sharp"])
def test_with_all_tokens_in_the_head_it_is_dense(k, tail, value):
    cost = one_vocabulary("sqeuclidean")[0]
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    dense = loss_of(cost, value=value)
    dense.support = Dense()
    expected = slopes(lambda z: dense(z, teacher), student)
    loss = loss_of(cost, k, tail, value=value)
    for left, right in zip(slopes(lambda z: loss(z, teacher), student), expected, strict=True):
        close(left, right, atol=1e-8, rtol=1e-6)
    assert loss.last_report.worst_coverage == 1


@pytest.mark.parametrize("vocab", [1, 2])
def test_the_smallest_vocabularies(vocab):
    student, teacher = logits(1, 3, vocab), logits(2, 3, vocab)
    for cost in ("discrete", "ordinal"):
        for tail in (True, False):
            value, gradient = slopes(lambda z: loss_of(cost, 1, tail)(z, teacher), student)  # noqa: B023
            assert gradient.isfinite().all()
            if vocab == 1:
                close(value, torch.zeros_like(value))
    if vocab == 2:  # both tokens are in the head, or the head is the same one and the rest a tail
        matrix = (1 - torch.eye(2)).double()
        check_against_reference(DiscreteCost(), (matrix,) * 3, student, teacher, 1)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck_in_the_logits_and_a_learnable_embedding(metric, learnable):
    # Well apart, so that the choice of tokens is the same at both ends of the difference.
    student = torch.tensor([[3.0, 1, -1, 0, -0.4, -2]], dtype=F64)
    teacher = torch.tensor([[-1.0, 2, 0, 3, -0.5, 1]], dtype=F64)

    def function(z, x, y):
        cost = EmbeddingCost(x, y, metric=metric, normalize=None, learnable=learnable)
        return loss_of(cost, epsilon=0.7)(z, teacher)

    def one(z, x):
        cost = EmbeddingCost(x, None, metric=metric, normalize=None, learnable=learnable)
        return loss_of(cost, epsilon=0.7)(z, teacher)

    z = student.requires_grad_()
    x, y = (points(seed, 6, 3).requires_grad_(learnable) for seed in (1, 2))
    assert gradcheck(function, (z, x, y), atol=1e-6, fast_mode=True)
    assert gradcheck(one, (z, x), atol=1e-6, fast_mode=True)


def test_a_learnable_cost_has_the_gradient_of_the_reference():
    matrix = self_costs(3, VOCAB)["sqeuclidean"]
    student, teacher = logits(1, 2, VOCAB), logits(2, 2, VOCAB)
    q, p = (naive.log_distribution(z).exp() for z in (student, teacher))
    _, expected = slopes(lambda c: naive.topk_divergence(q, p, (c,) * 3, 2, EPSILON), matrix)
    _, gradient = slopes(lambda c: loss_of(MatrixCost(c, learnable=True))(student, teacher), matrix)
    close(gradient, expected, atol=1e-8, rtol=1e-6)


def test_teacher_and_constant_embedding_receive_no_gradient():
    weight = torch.nn.Parameter(points(1, VOCAB, 3))
    student, teacher = (logits(s, 2, VOCAB).requires_grad_() for s in (1, 2))
    loss_of(EmbeddingCost(weight))(student, teacher).sum().backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None
    assert weight.grad is None
    learning = loss_of(EmbeddingCost(weight, learnable=True))
    for _ in range(2):  # nothing of the first graph is kept
        weight.grad = None
        learning(student, teacher).sum().backward()
        assert weight.grad.abs().max() > 0
    before = learning(student, teacher)
    with torch.no_grad():  # nor are the costs of the tail
        weight[:, 0] *= 3
    fresh = EmbeddingCost(weight, learnable=True)
    fresh.scale = learning.cost.scale
    assert (learning(student, teacher) - before).abs().min() > 1e-6
    close(learning(student, teacher), loss_of(fresh)(student, teacher))


# Input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize("tail", [True, False])
def test_masked_positions_may_hold_anything(value, tail):
    loss = loss_of(one_vocabulary("sqeuclidean")[0], tail=tail, value=value)
    student, teacher = logits(1, 2, 3, VOCAB), logits(2, 2, 3, VOCAB)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    expected, slope = slopes(lambda z: loss(z, teacher) * mask, student)
    outside = mask.unsqueeze(-1) == 0
    for garbage in (torch.nan, torch.inf, -torch.inf):
        noisy = teacher.masked_fill(outside, garbage)
        actual = slopes(
            lambda z, noisy=noisy: loss(z, noisy, mask=mask), student.masked_fill(outside, garbage)
        )
        close(actual[0], expected, atol=1e-8, rtol=1e-6)
        close(actual[1], slope, atol=1e-8, rtol=1e-6)
        with pytest.raises(ValueError, match="3 of 6 positions have teacher_logits"):
            loss(student, noisy)
        bad = student.clone()
        bad[1, 2, 0] = torch.nan
        with pytest.raises(ValueError, match="1 of 3 positions have student_logits"):
            loss(bad, noisy, mask=mask)
    loss.reduction = "mean"
    value, gradient = slopes(lambda z: loss(z, noisy, mask=torch.zeros_like(mask)), student)
    assert value == 0
    assert gradient.abs().max() == 0
    assert loss.last_report is None
    value, gradient = slopes(lambda z: loss(z, teacher[:0]), student[:0])
    assert value == 0
    assert gradient.shape == (0, 3, VOCAB)


def test_microbatches_add_up_to_the_batch():
    loss = loss_of(one_vocabulary("sqeuclidean")[0], reduction="mean")
    student, teacher = logits(1, 8, VOCAB), logits(2, 8, VOCAB)
    expected, slope = slopes(lambda z: loss(z, teacher), student)
    total, parts = 0.0, []
    for z, t in zip(student.split(3), teacher.split(3), strict=True):
        value, gradient = slopes(lambda z, t=t: loss(z, t, num_items_in_batch=8), z)
        total += value
        parts.append(gradient)
    close(total, expected, atol=1e-9, rtol=1e-7)
    close(torch.cat(parts), slope, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_it_does_not_depend_on_its_blocks(monkeypatch, masked):
    student, teacher = logits(1, 5, VOCAB), logits(2, 5, VOCAB)
    mask = torch.tensor([1, 1, 0, 1, 1]) if masked else None

    def run():
        loss = loss_of(one_vocabulary("cosine")[0])
        return slopes(lambda z: loss(z, teacher, mask=mask), student)

    whole = run()
    monkeypatch.setattr("otkd.supports.heads._BLOCK_ELEMENTS_ON_CPU", 2 * VOCAB)
    monkeypatch.setattr("otkd.supports.topk._BLOCK_ELEMENTS_ON_CPU", 1)
    monkeypatch.setattr("otkd.costs.tails._BLOCK_PAIRS", 2 * 1024)
    for left, right in zip(run(), whole, strict=True):
        close(left, right, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_precision_of_the_logits(dtype, temperature):
    loss = loss_of("discrete", 3, tolerance=1e-6, max_iterations=500, temperature=temperature)
    student, teacher = logits(1, 4, VOCAB, dtype=dtype), logits(2, 4, VOCAB, dtype=dtype)
    before = student.clone()
    actual, gradient = slopes(lambda z: loss(z, teacher), student)
    assert student.equal(before)  # nothing is done in place
    assert actual.dtype == torch.float32
    assert gradient.dtype == dtype
    exact, slope = slopes(lambda z: loss(z, teacher.double()), student.double())
    close(actual.double(), exact, atol=1e-4, rtol=1e-3)
    error = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    close(gradient.double(), slope, atol=1e-4, rtol=error)


@pytest.mark.parametrize("metric", METRICS)
def test_autocast_changes_nothing(metric):
    embedding = torch.randn(40, 8)
    student, teacher = (logits(s, 4, 40, dtype=torch.bfloat16) for s in (1, 2))

    def run(loss):
        return slopes(lambda z: loss(z, teacher), student)

    options = {"tolerance": 1e-4, "max_iterations": 200, "epsilon": 0.1}
    plain = run(loss_of(EmbeddingCost(embedding, metric=metric), **options))
    fresh = loss_of(EmbeddingCost(embedding, metric=metric), **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(fresh)
    for left, right in zip(inside + run(fresh), plain + plain, strict=True):
        close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("epsilon", [0.005, 0.1])
@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.filterwarnings("ignore::otkd.ConvergenceWarning")
def test_finite_on_minus_infinity_and_on_huge_gaps(epsilon, value, tail, debias):
    rows = torch.stack(
        [
            torch.tensor([0.0, -torch.inf, -torch.inf, 1.0, -torch.inf]),
            torch.tensor([-torch.inf, -torch.inf, 0.0, -torch.inf, -torch.inf]),  # fewer than k
            torch.tensor([0.0, 1e4, -1e4, 3.0, -1e4]),
            torch.tensor([80.0, 0.0, -90.0, -70.0, 1.0]),
            torch.zeros(5),
        ]
    )
    student, teacher = rows.repeat_interleave(5, 0), rows.repeat(5, 1)
    options = {"epsilon": epsilon, "debias": debias, "value": value}
    loss = loss_of("ordinal", 2, tail, tolerance=1e-4, max_iterations=100, **options)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values, gradient = slopes(
            lambda z, dtype=dtype: loss(z, teacher.to(dtype)), student.to(dtype)
        )
        assert values.isfinite().all()
        assert gradient.abs().max() < 10


def test_positions_whose_whole_mass_is_one_token():
    cost, matrix = one_vocabulary("sqeuclidean")
    rows = torch.full((VOCAB, VOCAB), -torch.inf, dtype=F64).fill_diagonal_(0)
    student, teacher = rows.repeat_interleave(VOCAB, 0), rows.repeat(VOCAB, 1)
    value, gradient = slopes(lambda z: loss_of(cost)(z, teacher), student)
    close(value, matrix.flatten(), atol=1e-8, rtol=1e-7)  # the cost between the two points
    assert gradient.abs().max() < 1e-9  # their softmax has none


def test_tokens_without_mass_do_not_count():
    cost, matrix = one_vocabulary("sqeuclidean")
    student, teacher = logits(1, 2, VOCAB), logits(2, 2, VOCAB)
    student[:, 6:], teacher[:, 6:] = -torch.inf, -torch.inf
    # All that have mass are in the head: it is the dense divergence between them.
    loss = loss_of(cost, 6)
    value, gradient = slopes(lambda z: loss(z, teacher), student)
    expected, slope = slopes(
        lambda z: F.sinkhorn_divergence(
            z, teacher[:, :6], cost=matrix[:6, :6], epsilon=EPSILON, **TIGHT
        ),
        student[:, :6],
    )
    close(value, expected, atol=1e-8, rtol=1e-6)
    close(gradient[:, :6], slope, atol=1e-8, rtol=1e-6)
    assert gradient[:, 6:].abs().max() == 0
    assert loss.last_report.worst_coverage > 1 - 1e-12


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("learnable", [False, True])
def test_tokens_with_one_embedding_are_one_point(metric, learnable):
    embedding = points(1, VOCAB, 3)
    embedding[3], embedding[7] = embedding[0], embedding[0]
    student = torch.full((1, VOCAB), -5.0, dtype=F64)
    teacher = student.clone()
    student[0, 0], student[0, 1], teacher[0, 3], teacher[0, 1] = 3, 2, 3, 2
    embedding.requires_grad_(learnable)
    cost = EmbeddingCost(embedding, metric=metric, learnable=learnable)
    loss = loss_of(cost)
    value, gradient = slopes(lambda z: loss(z, teacher), student)
    close(value, torch.zeros_like(value), atol=1e-6, rtol=0)
    assert gradient.abs().max() < 1e-6
    if learnable:
        loss(student, teacher + logits(3, 1, VOCAB)).sum().backward()
        assert embedding.grad.isfinite().all()


def test_a_row_without_a_direction_and_rows_that_are_not_finite_are_refused():
    embedding = points(1, VOCAB, 3)
    embedding[4] = 0
    with pytest.raises(ValueError, match="row 4 of the source embedding holds only zeros"):
        loss_of(EmbeddingCost(embedding, metric="cosine"))
    assert loss_of(EmbeddingCost(embedding))(logits(1, 2, VOCAB), logits(2, 2, VOCAB)).min() > 0
    weight = torch.nn.Parameter(embedding)
    loss = loss_of(EmbeddingCost(weight, learnable=True), VOCAB)
    with torch.no_grad():  # as a training run that diverges does
        weight[2, 1] = torch.nan
    with pytest.raises(ValueError, match="cost must hold only finite numbers"):
        loss(logits(1, 2, VOCAB), logits(2, 2, VOCAB))


def test_refused_settings():
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            TopK(k)
    with pytest.raises(ValueError, match="has the backends 'auto', 'torch'"):
        loss_of(backend="keops")(logits(1, 2, VOCAB), logits(2, 2, VOCAB))
    with pytest.raises(ValueError, match="9 source and 9 target tokens"):
        loss_of(EmbeddingCost(points(1, VOCAB, 3)))(logits(1, 2, 8), logits(2, 2, 8))


def test_logits_that_are_views():
    cost = one_vocabulary("sqeuclidean")[0]
    wide = logits(1, 2, 3, VOCAB + 4), logits(2, 2, 3, VOCAB + 4)
    student, teacher = (z[..., :VOCAB].contiguous() for z in wide)
    expected, slope = slopes(lambda z: loss_of(cost)(z, teacher), student)
    sliced = loss_of(cost, vocab_size=VOCAB)
    value, gradient = slopes(lambda z: sliced(z, wide[1]), wide[0])
    close(value, expected)
    close(gradient[..., :VOCAB], slope)
    assert gradient[..., VOCAB:].abs().max() == 0
    for view in (lambda z: z.transpose(0, 1), lambda z: z.flip(1), lambda z: z[:, ::2]):
        turned = slopes(lambda z, view=view: loss_of(cost)(view(z), view(teacher)), student)
        close(turned[0], view(expected))
        close(view(turned[1]), view(slope))


# Size, report, compiler --------------------------------------------------------------------------

LARGE = """
import resource
import torch
import otkd
from otkd.costs import EmbeddingCost
from otkd.supports import TopK
torch.set_num_threads(1)
V = 200_000
student, teacher = torch.randn(3, V, requires_grad=True), torch.randn(3, V)
embedding = torch.randn(V, 8)
for cost in (EmbeddingCost(embedding), EmbeddingCost(embedding, learnable=True)):
    loss = otkd.SinkhornLoss(cost, support=TopK(16))
    loss(student, teacher).backward()
    assert student.grad.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
"""


def test_a_vocabulary_of_200_000_takes_little_memory():
    run = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1500  # MiB, torch included; one (V, V) matrix would be 150 GiB


def test_more_than_2048_tokens_are_sampled_with_a_seed():
    vocab, embedding = 3000, points(1, 3000, 4)
    student, teacher = logits(1, 2, vocab), logits(2, 2, vocab)
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        loss = loss_of(EmbeddingCost(embedding), 8, tolerance=1e-6)
        values.append(slopes(lambda z: loss(z, teacher), student))  # noqa: B023
        assert torch.equal(torch.get_rng_state(), state)
    for left, right in zip(*values, strict=True):
        assert left.equal(right)  # bitwise: nothing is random and no order is left to chance
    same = loss(teacher, teacher)
    close(same, torch.zeros_like(same), atol=1e-9, rtol=0)


@pytest.mark.parametrize("cost", [DiscreteCost(), EmbeddingCost(points(1, 3000, 4))])
def test_the_sampled_costs_of_the_tail_are_close_to_those_of_the_vocabulary(cost):
    from otkd.costs.tails import mean_cost_to_all, soft_mean_cost

    sides, sizes = ("source", "target"), (3000, 3000)
    matrix = cost.matrices(*sizes, dtype=F64, device=torch.device("cpu"), self_terms=False).cross
    tokens = torch.arange(0, 3000, 17).reshape(3, 59)
    mean = mean_cost_to_all(cost, tokens, sides, sizes, F64)
    close(mean, matrix.mean(-1)[tokens], rtol=2e-3, atol=0)
    soft = soft_mean_cost(cost, sides, sizes, 0.1, F64, torch.device("cpu"))
    exact = -0.1 * (matrix / -0.1).exp().mean().log()
    close(soft, exact, rtol=0.05, atol=0)
    # With it an atom of all tokens is as far from itself as its tokens are: S of two flat rows.
    flat = torch.zeros(2, 3000, dtype=F64)
    loss = loss_of(cost, 1, debias=False, epsilon=0.1)
    assert loss(flat, flat)[0].item() == pytest.approx(soft.item(), rel=0.05)


def test_the_report():
    student = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.2, 0.3, 0.25, 0.25]]).log()
    teacher = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]).log()
    loss = otkd.SinkhornLoss("discrete", support=TopK(1), epsilon=0.5)
    loss(student, teacher)
    report = loss.last_report
    # Heads {0, 3} and {1, 0}: the student has .6 and .5 of its mass there, the teacher .5 and .7.
    assert report.coverage.item() == pytest.approx(0.5, rel=1e-6)
    assert report.worst_coverage.item() == pytest.approx(0.5, rel=1e-6)
    assert report.support == repr(TopK(1))
    assert report.iterations >= 1
    assert report.converged
    assert 0 <= report.marginal_error.item() <= 1e-4
    assert report.coverage.ndim == report.worst_coverage.ndim == 0
    loss(student[:1], teacher[:1])
    assert loss.last_report.coverage.item() == pytest.approx(0.5, rel=1e-6)
    loss.support = TopK(1, tail=False)
    loss(student[1:], teacher[1:])
    assert loss.last_report.coverage.item() == pytest.approx(0.5, rel=1e-6)
    loss.support = TopK(2)
    loss(student[:1], teacher[:1])  # {0, 1} and {3, 2}: all
    assert loss.last_report.coverage.item() == pytest.approx(1.0, rel=1e-6)
    loss.support = Dense()
    loss(student, teacher)
    assert loss.last_report.coverage is None


def test_a_compiled_model_around_the_loss():
    model = torch.nn.Linear(3, VOCAB, dtype=F64)
    features, teacher = points(1, 4, 3), logits(2, 4, VOCAB)
    loss = loss_of(one_vocabulary("sqeuclidean")[0], reduction="mean", tolerance=1e-2)

    def step(x, t):
        return loss(model(x), t)

    expected = torch.autograd.grad(step(features, teacher), model.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # breaks of the graph are no fault
        actual = torch.autograd.grad(compiled(features, teacher), model.parameters())
    for left, right in zip(actual, expected, strict=True):
        close(left, right)
    torch._dynamo.reset()


def test_the_trainers_record_has_the_coverage():
    from otkd.integrations.records import LossRecord

    loss = otkd.SinkhornLoss("discrete", support=TopK(1), epsilon=0.5)
    loss(torch.tensor([[0.6, 0.4, 0.0], [0.8, 0.2, 0.0]]).log(), torch.eye(3)[:2].mul(9))
    record = LossRecord()
    record.add(loss, share=1.0, steps=1.0, positions=lambda: torch.tensor(2.0))
    logged = record.take()
    torch.testing.assert_close(logged["solver/coverage"], loss.last_report.coverage.item())
    assert 0 < logged["solver/worst_coverage"] <= logged["solver/coverage"] < 1


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_clusters_under_autocast_are_those_without(metric):
    embedding = points(1, VOCAB, 4).float()
    student, teacher = (logits(seed, 3, VOCAB).float() for seed in (1, 2))

    def make():
        cost = EmbeddingCost(embedding, metric=metric)
        return otkd.SinkhornLoss(cost, support=TopK(2, clusters=3), epsilon=0.3)

    expected, loss = make()(student, teacher), make()
    with torch.autocast("cpu", torch.bfloat16):
        close(loss(student, teacher), expected, rtol=0, atol=0)
    close(loss(student, teacher), expected, rtol=0, atol=0)  # with what it has kept


def test_too_little_coverage_is_told_once_for_each_k():
    loss, flat = otkd.SinkhornLoss("discrete", support=TopK(1)), torch.zeros(2, VOCAB)
    peaked = 9 * torch.eye(VOCAB)[:2]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        loss(peaked, peaked)
        loss.support = TopK(1, tail=False)
        loss(flat, peaked)
        assert not told
        for k in (1, 2, 1):
            loss.support = TopK(k)
            loss(flat, flat + 0.1 * torch.rand_like(flat))
    assert [w.category for w in told] == [CoverageWarning] * 2
    assert {w.filename for w in told} == {__file__}
    assert ["the 1 most probable" in str(w.message) for w in told] == [True, False]
