import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import otkd
from otkd import supports
from otkd.costs import DiscreteCost, EmbeddingCost, MatrixCost, OrdinalCost, PowerCost
from tests import naive
from tests.problems import logits, points, seeds

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
METRICS = ("sqeuclidean", "euclidean", "cosine")
F64 = {"dtype": torch.float64, "device": torch.device("cpu")}


@given(seed=seeds, metric=st.sampled_from(METRICS), two=st.booleans())
def test_embedding_cost_is_a_distance_in_units_of_its_mean(seed, metric, two):
    x, y = points(seed, 5, 3) + 2, points(seed + 1, 8, 3) - 1
    pairs = ((x, y), (x, x), (y, y)) if two else ((x, x),) * 3
    plain = [naive.embedding_cost(u, v, metric) for u, v in pairs]
    sizes = plain[0].shape
    for normalize, scale in ((None, 1.0), ("mean", plain[0].mean())):
        cost = EmbeddingCost(x, y if two else None, metric=metric, normalize=normalize)
        matrices = cost.matrices(*sizes, **F64, self_terms=True)
        for actual, expected in zip(matrices, plain, strict=True):
            # One number, the mean of the cross cost over all entries, for all three.
            close(actual, expected / scale, atol=1e-6, rtol=1e-6)
        assert cost.scale == pytest.approx(float(scale), rel=1e-9)
        for own in matrices[1:]:
            assert own.diagonal().abs().max() == 0
            close(own, own.mT)
    close(matrices.cross.mean(), torch.tensor(1.0, dtype=torch.float64))
    assert cost.matrices(*sizes, **F64, self_terms=False).source is None
    close(cost(*sizes), matrices.cross.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_large_offsets_and_low_precision(metric):
    x = points(1, 6, 4).float()
    if metric == "cosine":  # nothing but rounding is left of the differences of the directions
        with pytest.raises(ValueError, match="the same direction"):
            EmbeddingCost(x + 1000, metric=metric)
    else:
        moved = EmbeddingCost(x + 1000, metric=metric)(6, 6)
        expected = naive.embedding_cost((x + 1000).double(), (x + 1000).double(), metric)
        if metric == "sqeuclidean":  # centred first: no digits are lost
            close(moved.double(), expected / expected.mean(), rtol=1e-3, atol=1e-3)
    half = EmbeddingCost(x.bfloat16(), metric=metric)(6, 6)
    exact = naive.embedding_cost(x.bfloat16(), x.bfloat16(), metric)
    assert half.dtype == torch.float32
    close(half.double(), exact / exact.mean(), rtol=1e-4, atol=1e-4)


def test_the_mean_euclidean_distance_of_many_tokens_is_sampled_with_a_seed(monkeypatch):
    x, y = points(1, 300, 4), points(2, 400, 4)
    exact = torch.cdist(x, y).mean().item()
    assert EmbeddingCost(x, y, metric="euclidean").scale == pytest.approx(exact, rel=1e-12)
    monkeypatch.setattr("otkd.costs.magnitude._SAMPLED_PAIRS", 2**15)
    sampled = EmbeddingCost(x, y, metric="euclidean").scale
    assert sampled != exact
    assert sampled == pytest.approx(exact, rel=0.01)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert EmbeddingCost(x, y, metric="euclidean").scale == sampled
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("side", ["source", "target"])
def test_bad_rows_are_named(metric, side):
    for value in (torch.nan, torch.inf):
        rows = {"source": points(1, 4, 3), "target": points(2, 5, 3)}
        rows[side][2, 1] = value
        with pytest.raises(ValueError, match=f"row 2 of the {side} embedding holds NaN or infin"):
            EmbeddingCost(**rows, metric=metric)
    rows[side][2] = 0
    if metric != "cosine":
        assert EmbeddingCost(**rows, metric=metric)(4, 5).isfinite().all()
        return
    with pytest.raises(ValueError, match=f"row 2 of the {side} embedding holds only zeros"):
        EmbeddingCost(**rows, metric=metric)


def test_refused_embeddings():
    x = torch.randn(4, 3)
    for source, options, message in (
        (x[0], {}, "must be a floating-point matrix"),
        (x.long(), {}, "must be a floating-point matrix"),
        (x[:0], {}, "must be a floating-point matrix"),
        (x, {"target": torch.randn(4, 2)}, "same width"),
        (x, {"metric": "l1"}, "metric must be one of"),
        (x, {"normalize": "max"}, "normalize must be"),
        (torch.ones(4, 3), {}, "all tokens have the same embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            EmbeddingCost(source, **options)
    with pytest.raises(ValueError, match="pass vocab_size="):
        EmbeddingCost(x)(5, 5)


@given(st.integers(1, 7), st.sampled_from([0.5, 1.0, 2.0, 3.0]))
def test_ordinal_and_discrete_costs(n, p):
    rows = [[float(abs(i - j)) ** p for j in range(n)] for i in range(n)]
    close(OrdinalCost(p)(n, n), torch.tensor(rows))
    close(DiscreteCost()(n, n), torch.tensor([[float(x > 0) for x in row] for row in rows]))
    matrices = OrdinalCost(p).matrices(n, n, **F64, self_terms=True)
    assert all(torch.equal(matrix, matrices.cross) for matrix in matrices)
    assert OrdinalCost(p).keeps_divergence_positive(0.1) == (p <= 2)
    for cost in (OrdinalCost(p), DiscreteCost()):
        with pytest.raises(ValueError, match="needs one vocabulary"):
            cost(n, n + 1)


def test_powers():
    x = points(1, 4, 3)
    base = EmbeddingCost(x, metric="euclidean", normalize=None)
    matrices = base.matrices(4, 4, **F64, self_terms=True)
    squared = base.power(2).matrices(4, 4, **F64, self_terms=True)
    for power, one in zip(squared, matrices, strict=True):
        close(power, one**2)
    assert base.power(2).matrices(4, 4, **F64, self_terms=False).target is None
    assert base.power(1) is base
    assert DiscreteCost().power(3.0)(3, 3).equal(DiscreteCost()(3, 3))
    assert OrdinalCost(1.5).power(2)(4, 4).equal(OrdinalCost(3.0)(4, 4))
    assert base.power(0.5).keeps_divergence_positive(0.1)
    assert not base.power(3).keeps_divergence_positive(0.1)
    for make in (OrdinalCost, lambda p: PowerCost(base, p)):
        for p in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="p must be a finite number above 0"):
                make(p)


def test_matrix_cost():
    matrix = torch.rand(3, 5)
    cost = MatrixCost(matrix)
    assert cost(3, 5).equal(matrix)
    assert not cost.state_dict()
    with pytest.raises(ValueError, match="square"):
        cost.matrices(3, 5, **F64, self_terms=True)
    with pytest.raises(ValueError, match="3 source and 5 target"):
        cost(5, 3)
    parameter = torch.nn.Parameter(matrix)
    assert next(MatrixCost(parameter, learnable=True).parameters()) is parameter
    assert not list(MatrixCost(parameter).parameters())
    for bad in (torch.rand(3), torch.eye(3).long(), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match="MatrixCost needs a matrix"):
            MatrixCost(bad)


def test_positive_kernels_are_recognised():
    x = points(1, 12, 3)
    assert MatrixCost((x[:, None] - x).square().sum(-1)).keeps_divergence_positive(0.1)
    cubes = OrdinalCost(3)(8, 8)
    # C = |i − j|³: exp(−C/ε) loses positivity for ε of the order of the cost.
    kernel = torch.exp(-cubes.double() / 50)
    assert torch.linalg.eigvalsh(kernel).min() < -1e-3
    assert not MatrixCost(cubes).keeps_divergence_positive(50.0)
    assert not MatrixCost(torch.rand(3, 5)).keeps_divergence_positive(0.1)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_distances_do_not_see_where_the_origin_is(metric):
    near = points(1, 40, 8).float()
    far = near + 1000
    exact = EmbeddingCost(far.double(), metric=metric)(40, 40)
    torch.testing.assert_close(EmbeddingCost(far, metric=metric)(40, 40), exact, atol=3e-4, rtol=0)


def test_a_learnable_cost_that_cannot_learn_is_told():
    for target in (None, points(2, 5, 3)):
        with pytest.warns(UserWarning, match="no embedding given requires a gradient"):
            EmbeddingCost(points(1, 4, 3), target, learnable=True)
    EmbeddingCost(points(1, 4, 3), points(2, 5, 3).requires_grad_(), learnable=True)


def test_a_module_is_no_embedding():
    with pytest.raises(TypeError, match=r"got Embedding\. Pass the weight of a module"):
        EmbeddingCost(torch.nn.Embedding(4, 3))


# Size --------------------------------------------------------------------------------------------

SIZES = (1e-44, 1e-20, 1e30)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", SIZES)
def test_a_normalised_cost_does_not_see_the_size_of_the_embedding(metric, size):
    x, y = points(1, 6, 3).float(), points(2, 8, 3).float()
    dtype = torch.float64 if size == 1e-44 else torch.float32  # which would round them
    for pair in ((x, None), (x, y)):
        expected = EmbeddingCost(*pair, metric=metric)
        large = [None if side is None else (side.to(dtype) * size) for side in pair]
        cost = EmbeddingCost(*large, metric=metric)
        n, m = expected.shape
        for dtype in (torch.float32, torch.float64):
            where = {"dtype": dtype, "device": torch.device("cpu"), "self_terms": True}
            close(
                cost.matrices(n, m, **where), expected.matrices(n, m, **where), rtol=1e-4, atol=1e-5
            )
        means = [
            c.mean_to_all(torch.arange(n)[None], ("source", "target"), torch.float32)
            for c in (cost, expected)
        ]
        if metric != "euclidean":
            close(*means, rtol=1e-4, atol=1e-5)
        if pair[1] is None:
            student, teacher = logits(1, 2, 6).float(), logits(2, 2, 6).float()
            for support in (supports.Dense(), supports.TopK(2), supports.TopK(2, clusters=2)):
                losses = [otkd.SinkhornLoss(c, support=support) for c in (cost, expected)]
                close(*[loss(student, teacher) for loss in losses], rtol=1e-3, atol=1e-4)


def test_one_row_of_another_size_than_the_others():
    x = points(1, 6, 3).float()
    x[2] *= 1e25
    cost = EmbeddingCost(x)(6, 6)
    assert cost.isfinite().all()
    close(cost.mean(), torch.tensor(1.0))
    close(EmbeddingCost(x, metric="cosine")(6, 6), EmbeddingCost(x.double(), metric="cosine")(6, 6))


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_an_embedding_of_another_size_is_refused_where_it_may_not_be_rescaled(metric, size):
    x = points(1, 6, 3).float() * size
    for embedding, options in (
        (x, {"normalize": None}),
        (torch.nn.Parameter(x), {"learnable": True}),
    ):
        with pytest.raises(ValueError, match="exceed the range of float32"):
            EmbeddingCost(embedding, metric=metric, **options)
    with pytest.raises(ValueError, match="whose squares"):
        EmbeddingCost(torch.nn.Parameter(x), metric="cosine", learnable=True)


def test_tokens_that_coincide_but_for_rounding_are_refused():
    row = points(1, 1, 5).expand(7, 5)
    for x in (row, row.float(), row.bfloat16(), row * 1e30, torch.zeros(4, 3)):
        for normalize in ("mean", None):
            with pytest.raises(ValueError, match="all tokens have the same embedding"):
                EmbeddingCost(x, normalize=normalize)
    scaled = row * torch.rand(7, 1)
    with pytest.raises(ValueError, match="the same direction"):
        EmbeddingCost(scaled, metric="cosine")
    for metric in METRICS:  # one token is no two that coincide
        assert EmbeddingCost(row[:1], metric=metric)(1, 1).equal(torch.zeros(1, 1))


def test_costs_beyond_float32_are_refused():
    x = points(1, 5, 3)
    base = EmbeddingCost(x)
    for make, message in (
        (lambda: MatrixCost(torch.full((2, 2), 1e31)), "MatrixCost has costs"),
        (
            lambda: MatrixCost(torch.full((2, 2), -1e200, dtype=torch.float64)),
            "MatrixCost has costs up to",
        ),
        (lambda: MatrixCost(torch.zeros(0, 0)), "MatrixCost needs a matrix"),
        (lambda: MatrixCost(torch.tensor([[0.0, torch.inf], [1.0, 0.0]])), "finite"),
        (lambda: OrdinalCost(200.0)(9, 9), "OrdinalCost has costs up to"),
        (lambda: PowerCost(base, 1e5), "PowerCost has costs up to inf"),
        (lambda: base.power(500.0), "PowerCost has costs up to"),
        (lambda: EmbeddingCost(torch.zeros(0, 3)), "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_cast_that_loses_the_embedding_is_refused():
    loss = otkd.SinkhornLoss(embedding=points(1, 5, 3) * 1e6)
    with pytest.raises(
        ValueError, match=r"after the cast from torch.float64 to torch.float16 row 0"
    ):
        loss.half()


# Constants and learners --------------------------------------------------------------------------

EVERY_SUPPORT = (
    supports.Dense(),
    supports.TopK(2),
    supports.TopK(2, tail=False),
    supports.TopK(2, clusters=2),
    supports.NearestNeighbours(2),
)


def matrix_of(x):
    return (x[:, None] - x).norm(dim=-1)


def table_of(cost):
    """A loss of each kind that takes a cost, by its support."""
    kinds = {
        repr(s): otkd.SinkhornLoss(cost, support=s)
        for s in EVERY_SUPPORT
        if isinstance(cost, EmbeddingCost) or s in EVERY_SUPPORT[:3]
    }
    return {**kinds, "wasserstein": otkd.WassersteinLoss(cost)}


CONSTANTS = {
    **{metric: (lambda x, metric=metric: EmbeddingCost(x, metric=metric)) for metric in METRICS},
    "target": lambda x: EmbeddingCost(x.clone().flip(0), x),
    "plain": lambda x: EmbeddingCost(x, normalize=None),
    "bfloat16": EmbeddingCost,
    "aligned": lambda x: otkd.alignment.aligned_cost(x, x, anchors=(range(6), range(6))),
    "matrix": MatrixCost,
}


@pytest.mark.parametrize("called_first", [True, False])
@pytest.mark.parametrize("kind", CONSTANTS)
def test_a_constant_is_what_it_was_when_the_cost_was_built(kind, called_first):
    x = points(1, 6, 3)
    given = {"matrix": matrix_of(x), "bfloat16": x.bfloat16(), "plain": x / 3}.get(kind, x)
    given.requires_grad_()
    cost = CONSTANTS[kind](given)
    assert not list(cost.parameters())
    student, teacher = logits(1, 3, 6), logits(2, 3, 6)
    fresh = {
        name: loss(student, teacher) for name, loss in table_of(CONSTANTS[kind](given)).items()
    }
    losses = table_of(cost)
    if called_first:
        with torch.inference_mode():  # what is kept then serves later gradients
            for loss in losses.values():
                loss(student, teacher)
    with torch.no_grad():
        given.mul_(1.5).add_(torch.randn_like(given))
    for name, loss in losses.items():
        student.grad = None
        value = loss(student.requires_grad_(), teacher)
        value.backward()
        close(value, fresh[name], rtol=1e-9, atol=1e-12, msg=f"{kind} {name}")
        assert student.grad.isfinite().all()
    assert given.grad is None


def test_what_a_cost_returns_is_the_callers():
    for cost in (EmbeddingCost(points(1, 4, 3)), MatrixCost(matrix_of(points(1, 4, 3)).float())):
        before = cost(4, 4).clone()
        cost(4, 4).mul_(0)
        close(cost(4, 4), before, rtol=0, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_every_support_sees_a_change_of_a_learnable_cost(metric):
    def built(x):
        parameter = torch.nn.Parameter(x.clone())
        return EmbeddingCost(parameter, metric=metric, normalize=None, learnable=True)

    x, y = points(1, 6, 3), points(2, 6, 3)
    student, teacher = logits(1, 3, 6), logits(2, 3, 6)
    for support in EVERY_SUPPORT[:4]:
        losses = {kind: otkd.SinkhornLoss(built(x), support=support) for kind in ("step", "load")}
        target = otkd.SinkhornLoss(built(y), support=support)
        for loss in losses.values():
            loss(student, teacher)
        with torch.no_grad():
            losses["step"].cost.source.copy_(y)
        losses["load"].load_state_dict(target.state_dict())
        for kind, loss in losses.items():
            if kind == "step" and "clusters=2" in repr(support):
                continue  # other clusters: those of the first call
            close(loss(student, teacher), target(student, teacher), msg=f"{support} {kind}")


@pytest.mark.parametrize("normalize", ["mean", None])
def test_a_learnable_cost_is_saved_with_what_its_numbers_are_divided_by(normalize):
    def built(x):
        return EmbeddingCost(torch.nn.Parameter(x.clone()), normalize=normalize, learnable=True)

    student, teacher = logits(1, 3, 6), logits(2, 3, 6)
    trained = otkd.SinkhornLoss(built(points(1, 6, 3)))
    with torch.no_grad():
        trained.cost.source.mul_(3)
    for path in ({}, {"assign": True}):
        loss = otkd.SinkhornLoss(built(points(2, 6, 3)))
        loss.load_state_dict(copy.deepcopy(trained.state_dict()), **path)
        close(loss(student, teacher), trained(student, teacher))
    without = {"cost.source": trained.cost.source.detach()}
    otkd.SinkhornLoss(built(points(2, 6, 3))).load_state_dict(without)  # as it used to be saved


def test_casts_and_copies_of_a_loss_agree_for_every_support():
    student, teacher = logits(1, 3, 6), logits(2, 3, 6)
    x = points(1, 6, 3)
    for support in EVERY_SUPPORT:
        loss = otkd.SinkhornLoss(embedding=x, support=support)
        before = loss(student, teacher)
        assert len(pickle.dumps(loss)) < 8000  # nothing that was kept for later calls
        for other in (
            copy.deepcopy(loss),
            pickle.loads(pickle.dumps(loss)),
            loss.cpu(),
            loss.double(),
        ):
            close(other(student, teacher), before)
        cast = copy.deepcopy(loss).bfloat16()
        expected = otkd.SinkhornLoss(embedding=x.bfloat16(), support=support)
        expected.cost.scale = loss.cost.scale
        close(cast(student, teacher), expected(student, teacher), msg=f"{support}")


@pytest.mark.parametrize(
    "cost", ["discrete", None, 1.0, [[0.0, 1.0], [1.0, 0.0]], points(1, 6, 3).numpy()]
)
@pytest.mark.parametrize(
    "function", ["sinkhorn_divergence", "transport_kl_divergence", "wasserstein_distance"]
)
def test_functions_refuse_other_forms_of_a_cost(function, cost):
    pair = logits(1, 3, 6), logits(2, 3, 6)
    with pytest.raises(TypeError, match=f"cost must be .* got {type(cost).__name__}"):
        getattr(otkd.functional, function)(*pair, cost=cost)
