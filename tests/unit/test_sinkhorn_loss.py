import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

import otkd
from otkd import functional as F
from otkd.costs import DiscreteCost, EmbeddingCost, MatrixCost, OrdinalCost
from otkd.supports import LARGEST_DENSE, Dense, TopK
from tests import naive
from tests.problems import logits, points, seeds, self_costs

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
TIGHT = {"tolerance": 1e-10, "max_iterations": 20_000}
VOCAB = 7


def reference(
    student, teacher, costs, epsilon=0.3, *, temperature=1.0, teacher_temperature=None, **options
):
    q = naive.log_distribution(student, temperature).exp()
    p = naive.log_distribution(teacher, teacher_temperature or temperature).exp()
    if not isinstance(costs, tuple):
        costs = (costs,) * 3
    return naive.divergence(q, p, costs, epsilon, **options)


def slopes(function, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


# Value and gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "teacher_temperature": 0.8}])
def test_value_and_gradient_are_those_of_unrolled_sinkhorn(value, debias, options):
    cost = self_costs(1, VOCAB)["sqeuclidean"]
    student, teacher = logits(1, 2, 3, VOCAB), logits(2, 2, 3, VOCAB)
    settings = {"debias": debias, **options}

    def solved(z):
        return F.sinkhorn_divergence(
            z, teacher, cost=cost, epsilon=0.3, value=value, **settings, **TIGHT
        )

    def unrolled(z):
        return reference(z, teacher, cost, sharp=value == "sharp", **settings)

    for left, right in zip(slopes(solved, student), slopes(unrolled, student), strict=True):
        close(left, right, atol=1e-7, rtol=1e-6)
    loss = otkd.SinkhornLoss(cost, epsilon=0.3, value=value, reduction="none", **settings, **TIGHT)
    close(loss(student, teacher), solved(student))
    assert loss.rescale_t2 is False


@given(seed=seeds, name=st.sampled_from(["embedding", "discrete", "ordinal"]))
def test_laws_of_the_divergence_of_logits(seed, name):
    embedding = points(seed, VOCAB, 4) if name == "embedding" else None
    loss = otkd.SinkhornLoss(
        name, embedding, epsilon=1.0, reduction="none", max_iterations=2000, tolerance=1e-8
    )
    student, teacher = logits(seed, 4, VOCAB), logits(seed + 1, 4, VOCAB)
    value, gradient = slopes(lambda z: loss(z, teacher), student)
    assert value.min() >= 0
    close(loss(teacher, student), value, atol=1e-6, rtol=1e-6)
    shifted = slopes(lambda z: loss(z, teacher - 3), student + 20)
    close(shifted[0], value, atol=1e-7, rtol=1e-6)
    close(shifted[1], gradient, atol=1e-6, rtol=1e-6)
    close(gradient.sum(-1), torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
    same, flat = slopes(lambda z: loss(z, teacher), teacher)
    close(same, torch.zeros_like(same), atol=1e-7, rtol=0)
    close(flat, torch.zeros_like(flat), atol=1e-6, rtol=0)


def test_equivariance_to_a_permutation_of_the_vocabulary_with_its_embedding():
    embedding, order = points(1, VOCAB, 4), torch.randperm(VOCAB)
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    plain = otkd.SinkhornLoss(embedding=embedding, **TIGHT)
    moved = otkd.SinkhornLoss(embedding=embedding[order], **TIGHT)
    value, gradient = slopes(lambda z: plain(z, teacher), student)
    other = slopes(lambda z: moved(z, teacher[:, order]), student[:, order])
    close(other[0], value, atol=1e-8, rtol=1e-6)
    close(other[1], gradient[:, order], atol=1e-7, rtol=1e-6)


def test_the_discrete_cost_tends_to_total_variation():
    student, teacher = logits(1, 4, VOCAB), logits(2, 4, VOCAB)
    tvd = F.total_variation_distance(student, teacher)
    gaps = []
    for epsilon in (0.3, 0.1, 0.03):
        loss = otkd.SinkhornLoss(
            "discrete",
            epsilon=epsilon,
            debias=False,
            reduction="none",
            tolerance=1e-5,
            max_iterations=20_000,
        )
        gaps.append((loss(student, teacher) - tvd).abs().max().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.06
    exact = otkd.WassersteinLoss("discrete", reduction="none")
    close(exact(student, teacher), tvd)


@pytest.mark.parametrize("learnable", [False, True])
def test_two_vocabularies(learnable):
    source, target = points(1, 5, 3), points(2, 8, 3)
    source.requires_grad_(learnable)
    cost = EmbeddingCost(source, target, learnable=learnable)
    loss = otkd.SinkhornLoss(cost, epsilon=0.3, reduction="none", **TIGHT)
    assert loss.bridges_vocabularies
    student, teacher = logits(1, 3, 5), logits(2, 3, 8)
    scale = naive.embedding_cost(source, target, "sqeuclidean").mean()
    costs = tuple(
        naive.embedding_cost(x, y, "sqeuclidean") / scale
        for x, y in ((source, target), (source, source), (target, target))
    )
    actual = slopes(lambda z: loss(z, teacher), student)
    expected = slopes(lambda z: reference(z, teacher, costs), student)
    for left, right in zip(actual, expected, strict=True):
        close(left, right, atol=1e-7, rtol=1e-6)
    with pytest.raises(ValueError, match="the cost is for 5 source and 8 target tokens"):
        loss(teacher, student)


# Input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["dual", "sharp"])
def test_masked_positions_may_hold_anything(value):
    loss = otkd.SinkhornLoss(self_costs(1, VOCAB)["l1"], epsilon=0.3, value=value, reduction="none")
    student, teacher = logits(1, 2, 3, VOCAB), logits(2, 2, 3, VOCAB)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    expected, slope = slopes(lambda z: loss(z, teacher) * mask, student)
    for garbage in (torch.nan, torch.inf, -torch.inf):
        outside = mask.unsqueeze(-1) == 0
        noisy = teacher.masked_fill(outside, garbage)
        actual = slopes(
            lambda z, noisy=noisy: loss(z, noisy, mask=mask), student.masked_fill(outside, garbage)
        )
        close(actual[0], expected, atol=1e-5, rtol=1e-4)
        close(actual[1], slope, atol=1e-4, rtol=1e-3)
    loss.reduction = "mean"
    value, gradient = slopes(lambda z: loss(z, noisy, mask=torch.zeros_like(mask)), student)
    assert value == 0
    assert gradient.abs().max() == 0
    assert loss.last_report is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["dual", "sharp"])
def test_precision_of_the_logits(dtype, value):
    loss = otkd.SinkhornLoss("discrete", epsilon=0.3, value=value, tolerance=1e-6)
    student, teacher = logits(1, 4, VOCAB, dtype=dtype), logits(2, 4, VOCAB, dtype=dtype)
    actual, gradient = slopes(lambda z: loss(z, teacher), student)
    assert actual.dtype == torch.float32
    assert gradient.dtype == dtype
    exact, slope = slopes(lambda z: loss(z, teacher.double()), student.double())
    close(actual.double(), exact, atol=1e-4, rtol=1e-3)
    error = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    close(gradient.double(), slope, atol=1e-4, rtol=error)


@pytest.mark.parametrize("epsilon", [0.005, 0.1])
@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.filterwarnings("ignore::otkd.ConvergenceWarning")
def test_finite_on_minus_infinity_and_on_huge_gaps(epsilon, value, debias):
    rows = torch.stack(
        [
            torch.tensor([0.0, -torch.inf, -torch.inf, 1.0, -torch.inf]),
            torch.tensor([-torch.inf, -torch.inf, 0.0, -torch.inf, -torch.inf]),
            torch.tensor([0.0, 1e4, -1e4, 3.0, -1e4]),
            torch.tensor([80.0, 0.0, -90.0, -70.0, 1.0]),
            torch.zeros(5),
        ]
    )
    student, teacher = rows.repeat_interleave(5, 0), rows.repeat(5, 1)
    loss = otkd.SinkhornLoss(
        "ordinal", epsilon=epsilon, debias=debias, value=value, reduction="none"
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values, gradient = slopes(
            lambda z, dtype=dtype: loss(z, teacher.to(dtype)), student.to(dtype)
        )
        assert values.isfinite().all()
        assert gradient.abs().max() < 10  # also where the solver stopped early


def test_a_token_without_mass_on_either_side_does_not_count():
    cost = self_costs(1, VOCAB)["euclidean"]
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    student[:, 5:], teacher[:, 5:] = -torch.inf, -torch.inf
    whole, gradient = slopes(
        lambda z: F.sinkhorn_divergence(z, teacher, cost=cost, epsilon=0.3, **TIGHT), student
    )
    head, slope = slopes(
        lambda z: F.sinkhorn_divergence(z, teacher[:, :5], cost=cost[:5, :5], epsilon=0.3, **TIGHT),
        student[:, :5],
    )
    close(whole, head, atol=1e-8, rtol=1e-6)
    close(gradient[:, :5], slope, atol=1e-8, rtol=1e-6)
    assert gradient[:, 5:].abs().max() == 0


def test_autocast_changes_nothing():
    loss = otkd.SinkhornLoss(embedding=torch.randn(VOCAB, 4))
    student, teacher = (logits(s, 4, VOCAB, dtype=torch.bfloat16) for s in (1, 2))
    plain = slopes(lambda z: loss(z, teacher), student)
    fresh = otkd.SinkhornLoss(embedding=loss.cost.source)
    with torch.autocast("cpu", torch.bfloat16):
        inside = slopes(lambda z: fresh(z, teacher), student)
    for left, right in zip(inside, plain, strict=True):
        close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("cost", ["embedding", "matrix", "discrete", "ordinal"])
def test_padding_of_the_vocabulary(cost):
    """Sliced at vocab_size and renormalised, whatever the padding holds and whoever has it."""
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    made = {
        "embedding": EmbeddingCost(points(1, VOCAB, 3)),
        "discrete": DiscreteCost(),
        "matrix": MatrixCost(self_costs(1, VOCAB)["l1"]),
        "ordinal": OrdinalCost(),
    }[cost]
    options = {"epsilon": 0.5, "reduction": "none", "tolerance": 1e-8, "max_iterations": 2000}
    plain = otkd.SinkhornLoss(made, **options)(student, teacher)
    loss = otkd.SinkhornLoss(made, vocab_size=VOCAB, **options)
    padding = torch.full((3, 2), 50.0, dtype=torch.float64)
    close(loss(torch.cat([student, padding], -1), torch.cat([teacher, -padding], -1)), plain)
    close(loss(torch.cat([student, padding * torch.nan], -1), teacher), plain)
    with pytest.raises(ValueError, match="vocab_size=7 is larger than the 6"):
        loss(student[:, :6], teacher)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_a_counted_position_is_refused(side, value):
    pair = [logits(1, 2, 3, VOCAB), logits(2, 2, 3, VOCAB)]
    pair[side][1, 1, 0] = value
    for loss in (otkd.SinkhornLoss("discrete"), otkd.WassersteinLoss("discrete")):
        name = ("student_logits", "teacher_logits")[side]
        with pytest.raises(ValueError, match=f"1 of 6 positions have {name} .*position 4"):
            loss(*pair)


def test_refused_settings():
    x = torch.randn(2, VOCAB)
    for error, message, options in (
        (ValueError, "needs embedding=", {}),
        (ValueError, 'used by cost="embedding" only', {"cost": "ordinal", "embedding": x}),
        (ValueError, "cost must be one of", {"cost": "euclidean"}),
        (TypeError, "cost must be one of", {"cost": 3}),
        (ValueError, "epsilon", {"cost": "discrete", "epsilon": 0.0}),
        (ValueError, "value must be one of", {"cost": "discrete", "value": "primal"}),
        (ValueError, "backend must be one of", {"cost": "discrete", "backend": "cuda"}),
        (TypeError, "support must be", {"cost": "discrete", "support": "all"}),
        (ValueError, "max_iterations", {"cost": "discrete", "max_iterations": 0}),
        (ValueError, "matrix", {"cost": torch.ones(3)}),
    ):
        with pytest.raises(error, match=message):
            otkd.SinkhornLoss(**options)
    with pytest.raises(ValueError, match="the student has 7 tokens and the teacher 6"):
        otkd.SinkhornLoss("discrete")(x, x[:, :6])
    with pytest.raises(ValueError, match="the cost is for 5 source and 5 target tokens"):
        otkd.SinkhornLoss(embedding=torch.randn(5, 3))(x, x)
    with pytest.raises(ValueError, match="symmetric"):
        F.sinkhorn_divergence(x, x, cost=torch.rand(VOCAB, VOCAB).fill_diagonal_(0))


def test_a_vocabulary_beyond_the_dense_limit_is_refused():
    wide = torch.zeros(1, LARGEST_DENSE + 1)
    with pytest.raises(ValueError, match=f"The limit is {LARGEST_DENSE} tokens"):
        otkd.SinkhornLoss("discrete", support=Dense())(wide, wide)


def test_auto_takes_the_heads_of_a_large_vocabulary():
    loss = otkd.SinkhornLoss("discrete")
    loss(torch.randn(3, 2048), torch.randn(3, 2048))
    assert loss.last_report.support == "Dense()"
    loss(torch.randn(3, 2049), torch.randn(3, 2049))
    assert loss.last_report.support == repr(TopK(64))
    embedding = torch.randn(2049, 4)
    loss = otkd.SinkhornLoss(embedding=embedding)
    logits = torch.randn(3, 2049)
    loss(torch.randn(3, 2049), logits)
    assert loss.last_report.support == repr(TopK(64, clusters=32))
    stored = otkd.TopKTeacher.from_logits(logits, k=64)
    loss(torch.randn(3, 2049), stored)
    assert loss.last_report.support == repr(TopK(64))
    cost = otkd.costs.EmbeddingCost(torch.nn.Parameter(embedding), learnable=True)
    loss = otkd.SinkhornLoss(cost)
    loss(torch.randn(3, 2049), logits)
    assert loss.last_report.support == repr(TopK(64))


def test_the_automatic_choice_is_logged_for_those_who_ask(caplog):
    """Every call makes it: at level INFO it would fill the output of a training."""
    loss = otkd.SinkhornLoss("discrete")
    with caplog.at_level("INFO", "otkd"):
        loss(torch.randn(3, 5), torch.randn(3, 5))
    assert not caplog.records
    with caplog.at_level("DEBUG", "otkd"):
        loss(torch.randn(3, 5), torch.randn(3, 5))
    assert "chose Dense()" in caplog.text


# Cost, report ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize("debias", [True, False])
def test_gradients_of_a_learnable_embedding(metric, value, debias):
    student, teacher = logits(1, 2, 4, scale=1), logits(2, 2, 5, scale=1)

    def function(z, x, y):
        cost = EmbeddingCost(x, y, metric=metric, normalize=None, learnable=True)
        return F.sinkhorn_divergence(
            z, teacher, cost=cost, epsilon=0.7, value=value, debias=debias, **TIGHT
        )

    inputs = (student, points(1, 4, 3), points(2, 5, 3))
    leaves = tuple(t.requires_grad_() for t in inputs)
    assert gradcheck(function, leaves, atol=1e-6, fast_mode=True)


def test_an_embedding_that_learns_and_one_that_does_not():
    student, teacher = logits(1, 2, VOCAB).requires_grad_(), logits(2, 2, VOCAB)
    weight = nn.Parameter(points(1, VOCAB, 3))
    fixed = otkd.SinkhornLoss(embedding=weight, epsilon=0.5)
    fixed(student, teacher).backward()
    assert weight.grad is None
    assert student.grad is not None
    assert not fixed.state_dict()
    assert not list(fixed.parameters())
    learning = otkd.SinkhornLoss(EmbeddingCost(weight, learnable=True), epsilon=0.5, **TIGHT)
    assert list(learning.parameters()) == [weight]
    learning(student, teacher).backward()
    first = weight.grad.clone()
    assert first.abs().max() > 0
    weight.grad = None
    learning(student, teacher).backward()  # nothing of the first graph is kept
    close(weight.grad, first)
    with torch.no_grad():
        weight.add_(1.0 + weight)
    assert learning(student, teacher) != fixed(student, teacher)


def test_a_fixed_embedding_does_not_follow_the_model_and_the_matrix_is_made_once():
    loss = otkd.SinkhornLoss(embedding=points(1, VOCAB, 3), epsilon=0.5)
    student, teacher = logits(1, 2, VOCAB), logits(2, 2, VOCAB)
    before = loss(student, teacher)
    cached = dict(loss.cost._cached)
    close(loss(student, teacher), before, rtol=0, atol=0)
    assert {key: id(m.cross) for key, m in loss.cost._cached.items()} == {
        key: id(m.cross) for key, m in cached.items()
    }


def test_report():
    loss = otkd.SinkhornLoss("discrete", epsilon=0.3)
    assert loss.last_report is None
    loss(logits(1, 4, VOCAB), logits(2, 4, VOCAB))
    report = loss.last_report
    assert report.converged
    assert 1 <= report.iterations <= 200
    assert 0 <= report.marginal_error <= 1e-4
    assert (report.support, report.backend) == ("Dense()", "torch")
    assert not report.marginal_error.requires_grad
    hasty = otkd.SinkhornLoss("discrete", epsilon=0.05, tolerance=1e-9, max_iterations=1)
    with pytest.warns(otkd.ConvergenceWarning, match="in 1 iterations"):
        hasty(logits(1, 4, VOCAB), logits(2, 4, VOCAB))
    assert not hasty.last_report.converged
    assert hasty.last_report.marginal_error > 1e-9


def test_debiasing_warns_where_it_may_be_negative():
    generator = torch.Generator().manual_seed(3)
    matrix = torch.rand(VOCAB, VOCAB, generator=generator)
    matrix = (matrix + matrix.T).fill_diagonal_(0)
    assert torch.linalg.eigvalsh((-matrix.double() / 2).exp()).min() < -1e-3
    for cost in (matrix, MatrixCost(matrix), OrdinalCost(3)):
        with pytest.warns(UserWarning, match="not known to be positive definite"):
            otkd.SinkhornLoss(cost, epsilon=2.0)
        otkd.SinkhornLoss(cost, epsilon=2.0, debias=False)
    for cost in self_costs(1, VOCAB).values():
        otkd.SinkhornLoss(cost)
    lopsided = torch.rand(VOCAB, VOCAB, generator=generator).fill_diagonal_(0)
    loss = otkd.SinkhornLoss(lopsided, epsilon=0.01)
    with pytest.raises(ValueError, match="symmetric"):
        loss(torch.zeros(1, VOCAB), torch.zeros(1, VOCAB))
