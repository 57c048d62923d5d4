"""The Triton kernel against the torch path: compiled where there is a GPU, else interpreted.

Triton is told to interpret before it is imported, and other packages import it, too: the kernel
runs in a process of its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch

from otkd.costs import CostMatrices, EmbeddingCost
from otkd.costs.tails import mean_cost_to_all, soft_mean_cost
from otkd.fused.topk_sinkhorn import LARGEST_HEAD, TopKSinkhorn, topk_sinkhorn
from otkd.ot.divergence import solve_divergence
from tests import naive
from tests.problems import generator, masses, objective_and_solver, points

METRICS = ("sqeuclidean", "euclidean", "cosine")
VOCAB, WIDTH = 40, 21
TWINS = 5, 7  # two tokens with one embedding
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("seeded")
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


@dataclass(frozen=True)
class Case:
    """A problem, by seed, and how it is solved."""

    metric: str = "sqeuclidean"
    positions: int = 1
    size: int = 11
    debias: bool = True
    epsilon: float = 0.2
    tolerance: float = 2e-6
    max_iterations: int = 300
    kind: str = "edges"
    offset: float = 2.0
    dtype: torch.dtype = torch.float32
    strided: bool = False

    def embedding(self) -> torch.Tensor:
        embedding = points(0, VOCAB, WIDTH) / torch.arange(1, WIDTH + 1)
        if self.kind == "clusters":
            embedding = points(0, 4, WIDTH).repeat(VOCAB // 4, 1) + 0.2 * embedding
        embedding += self.offset
        embedding[TWINS[1]] = embedding[TWINS[0]]
        return embedding.to(self.dtype)

    def cost(self) -> EmbeddingCost:
        return EmbeddingCost(self.embedding().double(), metric=self.metric)

    def problem(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """a, b and the tokens of every position; each position from the second is an edge."""
        n, k = self.positions, self.size
        a, b = masses(1, n, k + 1, spread=2.0), masses(2, n, k + 1, spread=2.0)
        order = torch.rand(n, VOCAB, generator=generator(3)).argsort(-1)
        order = order[~torch.isin(order, torch.tensor(TWINS))].reshape(n, -1)
        tokens = order[:, :k].clone()
        if self.kind == "equal":
            b = a
        elif self.kind in ("points", "twins"):  # all mass of each side on one token
            if self.kind == "twins":
                tokens[:, :2] = torch.tensor(TWINS)
            a, b = torch.eye(k + 1).double()[[0, 1], None].expand(2, n, k + 1)
        elif self.kind == "edges" and n == 5:
            tokens[1, -1] = tokens[1, 0]  # a repeated token and others without mass
            a[1, -2], b[1, -2], a[1, 2], b[1, 3:5] = 0, 0, 0, 0
            a[2] = torch.eye(k + 1)[4]  # one token
            tokens[3, 1], tokens[3, 4] = TWINS
            b[4], a[4, -1] = torch.eye(k + 1)[k], 0  # the tail alone, and none
        return *(x.float() / x.float().sum(-1, keepdim=True) for x in (a, b)), tokens

    def tail_costs(self, cost: EmbeddingCost) -> tuple[torch.Tensor, torch.Tensor]:
        sides, sizes = ("source", "target"), (VOCAB, VOCAB)
        every = torch.arange(VOCAB).unsqueeze(0)
        to_tail = mean_cost_to_all(cost, every, sides, sizes, torch.float64).squeeze(0)
        return to_tail, soft_mean_cost(
            cost, sides, sizes, self.epsilon, torch.float64, torch.device("cpu")
        )

    def arguments(self) -> tuple[list[torch.Tensor], dict]:
        """Of :func:`topk_sinkhorn`."""
        cost, embedding = self.cost(), self.embedding()
        a, b, tokens = self.problem()
        to_tail, corner = self.tail_costs(cost)
        tensors = [a, b, tokens, embedding, to_tail.float(), corner.float()]
        if self.strided:
            tensors[:4] = [x.mT.contiguous().mT for x in tensors[:4]]
        return [x.to(DEVICE) for x in tensors], {
            "metric": self.metric,
            "scale": cost.scale,
            "centre": embedding.float().mean(0).to(DEVICE) if self.offset else None,
            "epsilon": self.epsilon,
            "tolerance": self.tolerance,
            "max_iterations": self.max_iterations,
            "debias": self.debias,
        }

    def solved_by_torch(self, **changes):
        """Masses, cost and solution in float64; a requires a gradient."""
        case = replace(self, **changes)
        cost = case.cost()
        a, b, tokens = case.problem()
        a, b = (x.double() / x.double().sum(-1, keepdim=True) for x in (a, b))
        to_tail, corner = case.tail_costs(cost)
        matrix = torch.empty(len(a), case.size + 1, case.size + 1, dtype=torch.float64)
        matrix[:, :-1, :-1] = cost.between(tokens, tokens, ("source", "target"), torch.float64)
        matrix[:, -1, :-1] = matrix[:, :-1, -1] = to_tail[tokens]
        matrix[:, -1, -1] = corner
        options = objective_and_solver(
            epsilon=case.epsilon,
            tolerance=case.tolerance,
            max_iterations=case.max_iterations,
            debias=case.debias,
        )
        a.requires_grad_()
        return a, b, matrix, solve_divergence(a, b, CostMatrices(*(matrix,) * 3), *options)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and gradient, which is the soft minimum at points with and without mass."""
        a, b, matrix, solution = self.solved_by_torch(tolerance=1e-10, max_iterations=5000)
        potentials = [transport.potentials for transport in solution.parts]
        grad = naive.soft_minimum(potentials[0].g, b, matrix, self.epsilon)
        if self.debias:
            grad -= naive.soft_minimum(potentials[1].f, a, matrix, self.epsilon)
        return solution.value.detach(), grad.detach()


def _prepare(interpret: bool, cache: str) -> None:
    torch.set_num_threads(1)
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # else triton 3.9 warns of a change to come
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"


def _solve(case: Case):
    tensors, settings = case.arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's, of numbers that are not finite
        return [x.cpu() for x in topk_sinkhorn(*tensors, **settings)]


def _differentiate(case: Case, weights: torch.Tensor):
    tensors, settings = case.arguments()
    a = tensors[0].requires_grad_()
    value, error, iterations = TopKSinkhorn.apply(*tensors, settings)
    assert not error.requires_grad
    assert not iterations.requires_grad
    (value * weights.to(value)).sum().backward()
    return value.detach().cpu(), a.grad.cpu()


def _compile(metric: str, centred: bool, debias: bool, block: int) -> int:
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from otkd.fused.topk_kernel import topk_sinkhorn_kernel as kernel

    integers = {"head": "*i64", "iterations": "*i32"}
    integers |= dict.fromkeys(("stride", "size", "width", "max_iterations"), "i32")
    reals = dict.fromkeys(("scale", "epsilon", "tolerance"), "fp32")
    constants = {"METRIC": metric, "DEBIAS": debias, "BLOCK": block, "BLOCK_WIDTH": 16}
    if not centred:
        constants["centre"] = None
    kinds = integers | reals | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {x: kinds.get(x, "*fp32") for x in kernel.arg_names}, constants)
    compiled = compile_kernel(
        source, target=GPUTarget("cuda", 80, 32), options={"num_warps": block // 8}
    )
    return len(compiled.asm["cubin"])


def check_gradient(grad, expected, case: Case) -> None:
    """The error is measured where the mass is, and so is the gradient that reaches the logits."""
    a, difference = case.problem()[0].double(), grad.double() - expected
    assert (a * difference).abs().max() < case.tolerance
    assert difference[(a == 0) | (a > 0.01)].abs().max() < 5e-5


def _worker(interpret: bool, cache):
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(interpret, str(cache)))


@pytest.fixture(scope="module")
def on_chip(tmp_path_factory):
    with _worker(DEVICE == "cpu", tmp_path_factory.mktemp("triton")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@needs_triton
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("positions", "size"), [(5, 11), (1, 16)])
def test_value_and_gradient_are_those_of_the_torch_path(on_chip, positions, size, metric, debias):
    case = Case(metric, positions, size, debias, offset=0.0 if metric == "cosine" else 2.0)
    value, grad, error, iterations = on_chip(_solve, case)
    expected_value, expected_grad = case.expected()
    assert (error <= case.tolerance).all()
    assert ((iterations >= 1) & (iterations < case.max_iterations)).all()
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=1e-6)
    check_gradient(grad, expected_grad, case)


@needs_triton
@pytest.mark.parametrize(
    "change",
    [{"dtype": torch.bfloat16}, {"offset": 0.0, "strided": True}, {"size": 1}, {"size": 17}],
    ids=str,
)
def test_agrees_whatever_the_form_of_the_input(on_chip, change):
    case = Case(**{"positions": 2, "size": 6, **change})
    value, grad, *_ = on_chip(_solve, case)
    expected_value, expected_grad = case.expected()
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=1e-6)
    check_gradient(grad, expected_grad, case)


@needs_triton
def test_two_points_cost_what_is_between_them_where_the_kernel_underflows(on_chip):
    case = Case(kind="points", epsilon=1e-3)
    value, grad, *_ = on_chip(_solve, case)
    tokens = case.problem()[-1]
    between = case.cost().between(tokens, tokens, ("source", "target"), torch.float64)[0]
    assert between[0, 1] > 100 * case.epsilon
    torch.testing.assert_close(value.double(), between[0, 1:2], rtol=1e-5, atol=0)
    expected = between[:, 1] - between[0, 1] / 2 - between[:, 0]  # f_ab − f_aa
    torch.testing.assert_close(grad[0, :-1].double(), expected, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_different_tokens_of_one_embedding_are_at_no_distance(on_chip, metric):
    value, grad, *_ = on_chip(_solve, Case(metric, kind="twins", offset=100.0))
    assert value.abs().item() < 1e-6
    torch.testing.assert_close(grad[:, 0], grad[:, 1], rtol=0, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("metric", METRICS)
def test_is_zero_between_equals(on_chip, metric):
    value, grad, *_ = on_chip(_solve, Case(metric, positions=2, size=5, kind="equal"))
    assert value.abs().max() < 1e-6
    assert grad.abs().max() < 1e-5


@needs_triton
def test_gradient_reaches_the_masses_of_the_source(on_chip):
    case, weights = Case(positions=2, size=6), torch.tensor([2.0, -0.5], dtype=torch.float64)
    value, grad = on_chip(_differentiate, case, weights)
    a, *_, solution = case.solved_by_torch(tolerance=1e-10)
    (solution.value * weights).sum().backward()
    torch.testing.assert_close(value.double(), solution.value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), a.grad, rtol=1e-5, atol=2e-5)


@needs_triton
def test_stops_at_the_limit_and_says_so(on_chip):
    case = Case(debias=False, max_iterations=2, tolerance=1e-7)
    _, _, error, iterations = on_chip(_solve, case)
    with pytest.warns(UserWarning, match="did not converge"):
        *_, solution = case.solved_by_torch()
    assert not solution.report.converged
    assert iterations.tolist() == [2]
    assert error.item() > 100 * case.tolerance
    assert math.isclose(error.item(), solution.report.marginal_error.item(), rel_tol=1e-3)


@needs_triton
def test_secant_takes_a_fraction_of_the_plain_iterations(on_chip):
    case = Case(kind="clusters", epsilon=0.05, debias=False, tolerance=1e-4)
    *_, iterations = on_chip(_solve, case)
    a, b, matrix, _ = case.solved_by_torch()
    a, plain, error = a.detach(), 0, math.inf
    f = naive.soft_minimum(torch.zeros_like(b), b, matrix, case.epsilon)
    while error > case.tolerance:
        g = naive.soft_minimum(f, a, matrix, case.epsilon)
        error = (naive.plan(f, g, a, b, matrix, case.epsilon).sum(-1) - a).abs().sum()
        f = naive.soft_minimum(g, b, matrix, case.epsilon)
        plain += 1
    assert plain > 1.5 * iterations.item()


@needs_triton
@pytest.mark.parametrize(
    ("metric", "centred", "debias", "block"),
    [
        ("sqeuclidean", True, True, 16),
        pytest.param("cosine", False, False, 32, marks=pytest.mark.slow),
        pytest.param("euclidean", True, True, 128, marks=pytest.mark.slow),
    ],
)
def test_compiles_without_a_gpu(tmp_path, metric, centred, debias, block):
    with _worker(False, tmp_path) as pool:
        assert pool.submit(_compile, metric, centred, debias, block).result() > 0


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        (0, torch.full((1, 12), 1 / 12, dtype=torch.float64), "computes in float32"),
        (1, torch.full((1, 11), 1 / 11), r"b must have shape \(1, 12\)"),
        (2, torch.zeros(1, 11, dtype=torch.int32), "tokens must be int64"),
        (2, torch.zeros(1, LARGEST_HEAD + 1, dtype=torch.int64), "supports 1 to 128 tokens"),
        (3, torch.zeros(VOCAB, WIDTH, dtype=torch.int64), "floating-point matrix"),
        (4, torch.zeros(VOCAB + 1), "tail_cost must have shape"),
    ],
)
def test_refuses_what_does_not_fit(place, tensor, message):
    tensors, settings = Case().arguments()
    tensors[place] = tensor.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        topk_sinkhorn(*tensors, **settings)


@pytest.mark.parametrize(
    "setting",
    [
        {"metric": "l1"},
        {"scale": 0.0},
        {"epsilon": -1.0},
        {"tolerance": 0.0},
        {"max_iterations": 0},
    ],
    ids=str,
)
def test_refuses_settings_out_of_range(setting):
    tensors, settings = Case().arguments()
    with pytest.raises(ValueError, match=next(iter(setting))):
        topk_sinkhorn(*tensors, **{**settings, **setting})


def test_refuses_tensors_that_are_not_on_a_gpu():
    tensors, settings = Case().arguments()
    settings["centre"] = settings["centre"].cpu()
    with pytest.raises(ValueError, match="runs on a GPU"):
        topk_sinkhorn(*(x.cpu() for x in tensors), **settings)


@pytest.mark.parametrize("place", [1, 3, 4])
def test_refuses_a_gradient_in_anything_but_the_source(place):
    tensors, settings = Case().arguments()
    tensors[place].requires_grad_()
    with pytest.raises(ValueError, match="source masses only"):
        TopKSinkhorn.apply(*tensors, settings)


def test_names_the_package_that_is_missing(monkeypatch):
    from otkd.fused.topk_sinkhorn import _import_kernel

    monkeypatch.delitem(sys.modules, "otkd.fused.topk_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[triton\]'"):
        _import_kernel()
