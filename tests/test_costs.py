import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otkd.costs import DiscreteCost, EmbeddingCost, MatrixCost, OrdinalCost, PowerCost
from tests import naive
from tests.problems import points, seeds

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
    monkeypatch.setattr("otkd.costs.embedding._SAMPLED_PAIRS", 2**15)
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
    with pytest.raises(ValueError, match=f"row 2 of the {side} embedding holds nothing but zeros"):
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
    assert next(MatrixCost(parameter).parameters()) is parameter
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
    with pytest.raises(TypeError, match="got Embedding: of a module pass its weight"):
        EmbeddingCost(torch.nn.Embedding(4, 3))
