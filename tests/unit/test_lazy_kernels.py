import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import otkd
from otkd.costs import DiscreteCost, EmbeddingCost, MatrixCost
from otkd.ot.kernels import blocked
from otkd.ot.kernels.base import LogKernel, ProductKernel
from otkd.ot.kernels.blocked import BlockedCost
from otkd.ot.kernels.keops import KeOpsCost, obstacle_to_keops
from otkd.supports import Dense, dense
from tests import naive
from tests.problems import generator, logits, masses, points, seeds

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
F64 = torch.float64
METRICS = ("sqeuclidean", "euclidean", "cosine")
WIDTH = 3  # of every embedding: KeOps compiles its formulas anew for another
SIDES = {"one": ("source", "target"), "two": ("source", "target"), "within": ("target", "target")}
TIGHT = {"tolerance": 1e-11, "max_iterations": 20_000}


@pytest.fixture
def small_blocks(monkeypatch):
    """Of four rows, so that a matrix has several and the last is another."""
    monkeypatch.setattr(blocked, "_BLOCK_ELEMENTS_ON_CPU", 1)
    monkeypatch.setattr(blocked, "_FEWEST_ROWS", 4)


@pytest.fixture
def keops():
    obstacle = obstacle_to_keops(torch.device("cpu"))
    if obstacle is not None:
        pytest.skip(str(obstacle))


def embedding_cost(metric, sides, n=11, m=14):
    target = None if sides == "one" else points(2, m, WIDTH)
    return EmbeddingCost(points(1, n, WIDTH), target, metric=metric)


def naive_matrix(cost, sides):
    x, y = (cost._side(side) for side in SIDES[sides])
    return naive.embedding_cost(x, y, cost.metric) / cost.scale


def applied(kernel, n, m):
    """All that is asked of a kernel, of three problems, both ways and of two of them."""
    a, b = masses(3, 3, n), masses(4, 3, m)
    a[0, 1], b[1, :2] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    drawn = ((m, 5), (m, 6), (n, 7))
    g, y, x = (torch.randn(3, k, generator=generator(seed), dtype=F64) for k, seed in drawn)
    g = g / 5
    results = {}
    for name, rows in (("of all", [0, 1, 2]), ("of two", [2, 0])):
        one = kernel if len(rows) == 3 else kernel.rows(torch.tensor(rows))
        back = one.transposed
        f = one.softmin(g[rows], b[rows].log())
        results[f"softmin {name}"] = f
        results[f"mean {name}"] = one.mean(f, g[rows], b[rows], y[rows])
        results[f"mean_cost {name}"] = one.mean_cost(f, g[rows], b[rows])
        h = back.softmin(f, a[rows].log())
        results[f"transposed softmin {name}"] = h
        results[f"transposed mean {name}"] = back.mean(h, f, a[rows], x[rows])
        results[f"transposed mean_cost {name}"] = back.mean_cost(h, f, a[rows])
        results[f"back {name}"] = back.transposed.softmin(g[rows], b[rows].log())
    return results


def check_kernel(lazy, metric, sides, epsilon):
    cost = embedding_cost(metric, sides)
    matrix = naive_matrix(cost, sides)
    reference = ProductKernel if epsilon > 0.1 else LogKernel
    kernel = lazy(cost, SIDES[sides], dtype=F64).kernel(epsilon)
    actual = applied(kernel, *matrix.shape)
    expected = applied(reference(matrix, epsilon), *matrix.shape)
    for name, values in expected.items():
        close(
            actual[name],
            values,
            rtol=1e-8,
            atol=1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def solved(cost, backend="auto", **options):
    """Value, gradient and report of a loss with every token."""
    n, m = cost.shape
    student, teacher = logits(1, 3, n).requires_grad_(), logits(2, 3, m)
    loss = otkd.SinkhornLoss(
        cost, epsilon=0.2, support=Dense(), backend=backend, reduction="none", **options, **TIGHT
    )
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient, loss.last_report


# Kernels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("epsilon", [0.3, 0.005])
def test_blocks_apply_the_kernel_of_the_matrix(small_blocks, metric, sides, epsilon):
    check_kernel(BlockedCost, metric, sides, epsilon)


@pytest.mark.parametrize("metric", METRICS)
def test_keops_applies_the_kernel_of_the_matrix(keops, metric):
    for sides in SIDES:
        for epsilon in (0.3, 0.005):
            check_kernel(KeOpsCost, metric, sides, epsilon)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_blocks_are_the_rows_of_the_matrix(small_blocks, metric, sides, dtype):
    cost = embedding_cost(metric, sides)
    matrix = naive_matrix(cost, sides)
    lazy = BlockedCost(cost, SIDES[sides], dtype=dtype)
    assert (lazy.shape, lazy.dtype, lazy.ndim) == (tuple(matrix.shape), dtype, 2)
    for one, expected in ((lazy, matrix), (lazy.mT, matrix.T)):
        blocks = list(one.blocks())
        assert [len(block) for _, block in blocks[:-1]] == [4] * (len(expected) // 4)
        assert all(block.dtype == dtype for _, block in blocks)
        rows = torch.cat([torch.arange(len(expected))[rows] for rows, _ in blocks])
        close(rows, torch.arange(len(expected)))
        whole = torch.cat([block for _, block in blocks])
        close(whole.double(), expected, rtol=1e-5, atol=1e-3 if metric == "euclidean" else 1e-6)
        if sides != "two":
            assert whole.diagonal().abs().max() == 0


def test_a_block_is_small_beside_the_matrix_and_never_empty():
    cost = BlockedCost(EmbeddingCost(points(1, 3000, WIDTH)))
    sizes = [len(block) for _, block in cost.blocks()]
    assert sum(sizes) == 3000
    assert max(sizes) * 3000 <= blocked._BLOCK_ELEMENTS_ON_CPU
    assert min(sizes) > 0
    wide = BlockedCost(EmbeddingCost(points(1, 70, WIDTH), points(2, 100_000, WIDTH)))
    assert [len(block) for _, block in wide.blocks()] == [64, 6]


@given(seeds, st.sampled_from(METRICS), st.booleans(), st.sampled_from([0, 30]))
def test_the_largest_cost_is_an_upper_bound_and_no_far_one(seed, metric, two, offset):
    x, y = points(seed, 9, WIDTH) + offset, points(seed + 1, 6, WIDTH) + offset
    cost = EmbeddingCost(x, y if two else None, metric=metric)
    lazy = BlockedCost(cost, dtype=F64)
    largest = torch.cat([block for _, block in lazy.blocks()]).max().item()
    assert largest <= lazy.largest() * (1 + 1e-9)
    if metric == "sqeuclidean":
        assert lazy.largest() <= 20 * largest


def test_far_from_the_origin_float32_is_as_exact_as_near_it():
    x = points(1, 9, WIDTH)
    near, far = EmbeddingCost(x), EmbeddingCost(x.float() + 100)
    b = masses(4, 3, 9)
    expected = LogKernel(naive_matrix(near, "one"), 0.3).softmin(torch.zeros_like(b), b.log())
    b = b.float()
    actual = BlockedCost(far).kernel(0.3).softmin(torch.zeros_like(b), b.log())
    close(actual.double(), expected, rtol=1e-4, atol=1e-4)


# Losses ------------------------------------------------------------------------------------------

PROBLEMS = {
    "dual": {},
    "sharp": {"value": "sharp"},
    "biased": {"debias": False},
    "marginal_relaxation": {"marginal_relaxation": 1.0},
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("metric", METRICS)
def test_above_the_limit_a_loss_is_the_same_without_a_matrix(
    small_blocks, monkeypatch, problem, sides, metric
):
    cost = embedding_cost(metric, sides)
    expected = solved(cost, **PROBLEMS[problem])
    assert cost._cached
    monkeypatch.setattr(dense, "LARGEST_DENSE", 10)
    lazy = embedding_cost(metric, sides)
    for backend in ("auto", "torch"):
        actual = solved(lazy, backend, **PROBLEMS[problem])
        close(actual[:2], expected[:2], rtol=1e-6, atol=1e-8)
        assert (actual[2].support, actual[2].backend) == ("Dense()", "torch")
    assert not lazy._cached


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_loss_through_keops_is_that_of_torch(keops, problem):
    for sides in ("one", "two"):
        expected = solved(embedding_cost("cosine", sides), **PROBLEMS[problem])
        cost = embedding_cost("cosine", sides)
        actual = solved(cost, "keops", **PROBLEMS[problem])
        close(actual[:2], expected[:2], rtol=1e-6, atol=1e-8)
        assert (actual[2].support, actual[2].backend) == ("Dense()", "keops")
        assert not cost._cached


def test_positions_in_blocks_and_a_mask(monkeypatch):
    cost = embedding_cost("sqeuclidean", "one")
    student, teacher, mask = (
        logits(1, 2, 4, 11),
        logits(2, 2, 4, 11),
        torch.arange(8).reshape(2, 4) % 3,
    )
    loss = otkd.SinkhornLoss(cost, support=Dense(), **TIGHT)
    expected = loss(student, teacher, mask=mask)
    monkeypatch.setattr(dense, "LARGEST_DENSE", 10)
    monkeypatch.setattr(dense, "_BLOCK_ELEMENTS_ON_CPU", 22)
    close(loss(student, teacher, mask=mask), expected)


def test_in_one_vocabulary_one_object_is_all_three_costs():
    where = {"dtype": F64, "device": torch.device("cpu")}
    for sides, distinct in (("one", 1), ("two", 3)):
        costs = dense._lazy_costs(BlockedCost, embedding_cost("cosine", sides), True, where)
        assert len({id(cost) for cost in costs}) == distinct
        assert [cost.shape for cost in costs] == (
            [(11, 11)] * 3 if sides == "one" else [(11, 14), (11, 11), (14, 14)]
        )


# Refused and replaced ----------------------------------------------------------------------------


def test_costs_that_must_be_matrices_are_refused(monkeypatch):
    learnable = EmbeddingCost(points(1, 11, WIDTH).requires_grad_(), learnable=True)
    matrix = MatrixCost(torch.ones(11, 11, dtype=F64).fill_diagonal_(0))
    for kind in (BlockedCost, KeOpsCost):
        with pytest.raises(ValueError, match="learnable embedding"):
            kind(learnable)
        with pytest.raises(ValueError, match="requires an EmbeddingCost, got MatrixCost"):
            kind(matrix)
    student, teacher = logits(1, 3, 11), logits(2, 3, 11)
    named = {
        "a learnable EmbeddingCost": learnable,
        "MatrixCost": matrix,
        "DiscreteCost": DiscreteCost(),
    }
    for name, cost in named.items():
        with pytest.raises(ValueError, match=f"constant EmbeddingCost, got {name}"):
            otkd.SinkhornLoss(cost, support=Dense(), backend="keops")(student, teacher)
    monkeypatch.setattr(dense, "LARGEST_DENSE", 10)
    for name, cost in named.items():
        with pytest.raises(ValueError, match=f"The limit is 10 tokens .* this is {name}"):
            otkd.SinkhornLoss(cost, support=Dense())(student, teacher)
    with pytest.raises(ValueError, match="'auto', 'torch', 'keops', got 'triton'"):
        otkd.SinkhornLoss(matrix, support=Dense(), backend="triton")(student, teacher)


def test_there_is_no_coupling_in_full():
    f = torch.zeros(1, 11, dtype=F64)
    with pytest.raises(NotImplementedError, match="as large as the cost"):
        BlockedCost(embedding_cost("cosine", "one")).kernel(0.1).coupling(f, f, f, f)


LOSS = f"""
import sys, warnings
if "missing" in sys.argv:
    sys.modules["pykeops"] = None
import torch, otkd
from otkd.supports import Dense
x = torch.arange(15, dtype=torch.float64).reshape(5, {WIDTH}).sin()
def loss(backend):
    made = otkd.SinkhornLoss(embedding=x, support=Dense(), backend=backend, tolerance=1e-9)
    return made, made(x.T[:2].contiguous(), x.T[1:].contiguous())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    made, value = loss("keops")
    made, value = loss("keops")
assert abs(value - loss("auto")[1]) < 1e-8
for warning in caught:
    print(warning.message, file=sys.stderr)
print(made.last_report.backend, len(caught))
"""


def run_loss(*arguments, **environment):
    command = [sys.executable, "-c", LOSS, *arguments]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_keops_leaves_the_output_of_a_program_alone(keops, tmp_path):
    out, messages = run_loss(KEOPS_CACHE_FOLDER=str(tmp_path), PYKEOPS_VERBOSE="1")
    assert out == "keops 0\n"
    assert "Compiling" in messages  # it had something to say


def test_without_pykeops_torch_computes_and_says_so_once():
    out, messages = run_loss("missing")
    assert out == "torch 1\n"
    assert "pip install '.[keops]'" in messages


def test_without_a_compiler_torch_computes_and_says_so_once(tmp_path):
    pytest.importorskip("pykeops", reason="pykeops is not installed")
    out, messages = run_loss(PATH=str(tmp_path), CXX="", KEOPS_CACHE_FOLDER=str(tmp_path))
    assert out == "torch 1\n"
    assert "no C++ compiler" in messages
    assert "pip install '.[keops]'" in messages
