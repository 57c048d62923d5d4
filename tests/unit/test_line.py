"""Transport along a line, by sums: that of the matrix, for any points, and in the loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import otkd
from otkd.functional import batch_transport
from otkd.ot.kernels.base import ProductKernel
from otkd.ot.kernels.line import LineCost, LineKernel
from tests.problems import generator, logits, masses, seeds
from tests.unit.test_batch_transport import COSTS, EXACT, distances, unrolled, with_gradient

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
F64 = torch.float64


@pytest.fixture
def from_the_first(monkeypatch):
    """Sums along the line for any number of samples."""
    monkeypatch.setattr(batch_transport, "_LINE_FROM", 0)


def on_a_line(seed, n, dtype=F64):
    """Probabilities, some of them equal and some at the ends."""
    drawn = torch.rand(n, generator=generator(seed), dtype=dtype)
    drawn[n // 2 :] = drawn[: n - n // 2].clone()
    drawn[0], drawn[-1] = 0, 1
    return drawn


def kernels(x, y, slope, epsilon):
    matrix = slope * (x.unsqueeze(-1) - y).abs()
    return LineKernel(x, y, slope, epsilon), ProductKernel(matrix, epsilon)


# The kernel --------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.05, 0.3, 4.0]))
def test_it_is_the_kernel_of_the_matrix(seed, n, m, epsilon):
    x, y = on_a_line(seed, n), on_a_line(seed + 1, m)
    x[: min(n, m) // 2] = y[: min(n, m) // 2]
    a, b = masses(seed, 2, n), masses(seed + 1, 2, m)
    g = torch.randn(2, m, generator=generator(seed), dtype=F64) / 5
    line, matrix = kernels(x, y, 2.0, epsilon)
    f = matrix.softmin(g, b.log())
    close(line.softmin(g, b.log()), f)
    close(line.mean(f, g, b, g), matrix.mean(f, g, b, g))
    close(line.mean_cost(f, g, b), matrix.mean_cost(f, g, b), atol=1e-12, rtol=1e-9)
    close(line.transposed.softmin(f, a.log()), matrix.transposed.softmin(f, a.log()))
    assert line.transposed.transposed is line


@given(seeds, st.integers(1, 8), st.integers(1, 8))
def test_what_the_coupling_gives_the_points(seed, n, m):
    x, y = on_a_line(seed, n).requires_grad_(), on_a_line(seed + 1, m).requires_grad_()
    left, right = masses(seed, 3, n), masses(seed + 1, 3, m)
    f, g = (torch.randn(3, k, generator=generator(seed + k), dtype=F64) / 5 for k in (n, m))
    line, matrix = kernels(x.detach(), y.detach(), 1.5, 0.2)
    cost = 1.5 * (x.unsqueeze(-1) - y).abs()
    expected = torch.autograd.grad(cost, (x, y), matrix.coupling(f, g, left, right))
    for needed in ((True, True), (True, False), (False, True)):
        found = line.pull_back(f, g, left, right, needed)
        for part, reference, wanted in zip(found, expected, needed, strict=True):
            assert (part is not None) == wanted
            if part is not None:
                close(part, reference)


def test_float32_holds_at_the_largest_exponents():
    x, y = (on_a_line(seed, 3000, torch.float32) for seed in (1, 2))
    epsilon = 2 / 60
    assert LineCost.represents(2.0, epsilon, torch.float32)
    assert not LineCost.represents(2.0, 0.99 * epsilon, torch.float32)
    exact = LineKernel(x.double(), y.double(), 2.0, epsilon)
    weights = torch.rand(2, 3000, generator=generator(3)).square()
    for vectors in (weights, torch.eye(3000)[:2]):  # and a single point, far from most
        found = LineKernel(x, y, 2.0, epsilon).apply(vectors)
        close(found.double(), exact.apply(vectors.double()), rtol=1e-4, atol=0)


# The loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["l1", "euclidean"])
@pytest.mark.parametrize("debias", [False, True])
def test_many_samples_of_two_classes_are_those_of_unrolled_iterations(from_the_first, cost, debias):
    student, teacher = logits(1, 9, 2), logits(2, 9, 2)
    teacher[3], student[5] = student[3], student[6]
    variant = {"value": "dual", "debias": debias}
    loss = otkd.BatchSinkhornLoss(cost, epsilon=0.2, **variant, **EXACT)
    value, gradient = with_gradient(lambda z: loss(z, teacher), student)
    expected = with_gradient(
        lambda z: unrolled(z, teacher, cost=cost, epsilon=0.2, **variant), student
    )
    close(value, expected[0])
    close(gradient, expected[1], atol=1e-9, rtol=1e-7)
    assert gradcheck(lambda z: loss(z, logits(2, 9, 2)), logits(1, 9, 2).requires_grad_())


@pytest.mark.parametrize("cost", ["l1", "euclidean"])
@pytest.mark.parametrize("debias", [False, True])
def test_it_takes_over_above_384_samples_and_gives_the_same(monkeypatch, cost, debias):
    student, teacher = logits(1, 385, 2), logits(2, 385, 2)
    loss = otkd.BatchSinkhornLoss(cost, debias=debias, **EXACT)
    made = []
    initialise = LineCost.__init__
    monkeypatch.setattr(
        LineCost, "__init__", lambda self, *args: made.append(args) or initialise(self, *args)
    )
    found = with_gradient(lambda z: loss(z, teacher), student)
    assert made
    made.clear()
    monkeypatch.setattr(batch_transport, "_LINE_FROM", 385)
    expected = with_gradient(lambda z: loss(z, teacher), student)
    assert not made
    close(found[0], expected[0])
    close(found[1], expected[1], atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize(
    ("classes", "options"),
    [
        (3, {}),
        (2, {"cost": "sqeuclidean"}),
        (2, {"value": "sharp"}),
        (2, {"sample_cost": 0.3}),
        (2, {"epsilon": 0.01}),
    ],
)
def test_everything_else_has_a_matrix(monkeypatch, from_the_first, classes, options):
    monkeypatch.setattr(LineCost, "__init__", None)
    loss = otkd.BatchSinkhornLoss(tolerance=0.5, **options)
    assert loss(logits(1, 5, classes).float(), logits(2, 5, classes).float()).isfinite()


@pytest.mark.parametrize("cost", ["l1", "euclidean"])
def test_debiased_is_zero_at_equal_sets(cost):
    points = logits(1, 400, 2).float()
    loss = otkd.BatchSinkhornLoss(cost, debias=True)
    value, gradient = with_gradient(lambda z: loss(z, points), points)
    assert value.abs() < 1e-5
    assert gradient.abs().max() < 1e-6


def test_memory_does_not_grow_with_pairs():
    student = logits(1, 100_000, 2).float()  # a matrix would take 40 GB
    loss = otkd.BatchSinkhornLoss("l1", tolerance=1e-3)
    value, gradient = with_gradient(lambda z: loss(z, logits(2, 100_000, 2).float()), student)
    assert value > 0
    assert gradient.isfinite().all()
    assert loss.last_report.converged


# Distances that leave a line ---------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("classes", [3, 40])
def test_close_points_in_float32_have_their_gradient(cost, classes):
    student = logits(1, 60, classes).float()
    teacher = student + 1e-3 * logits(2, 60, classes).float()
    loss = otkd.BatchSinkhornLoss(cost, debias=False, max_iterations=500)
    found = with_gradient(lambda z: loss(z, teacher), student)
    exact = with_gradient(lambda z: loss(z, teacher.double()), student.double())
    error = (found[1] - exact[1]).norm() / exact[1].norm()
    assert error < 1e-3


def test_distances_are_those_pair_by_pair():
    x, y = torch.rand(70, 2), torch.rand(70, 2)
    y[:35] = x[:35] + 1e-6
    found = batch_transport.point_distances(x, y, "euclidean")
    close(found, distances(x, y, "euclidean"), atol=1e-7, rtol=1e-6)
