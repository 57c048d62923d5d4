"""Tensors no loss can compute with are refused in plain words; Jacobians are right or refused."""

import dataclasses

import pytest
import torch
from torch.autograd import forward_ad

import otkd
from otkd import functional, ot
from otkd.supports import TopK
from tests.problems import logits, points

pytestmark = pytest.mark.usefixtures("seeded")
VOCAB = 6
MATRIX = (torch.arange(6.0)[:, None] - torch.arange(6.0)).abs()
LABELS = torch.tensor([0, 1, -100, 3])
OPTIONS = {
    "sinkhorn": {"embedding": points(1, VOCAB, 3)},
    "transport_kl": {"embedding": points(1, VOCAB, 3)},
    "wasserstein": {"cost": MATRIX},
}


def of_logits(loss):
    return lambda student, teacher: loss(student, teacher, labels=LABELS)


LOSSES = {
    name: of_logits(otkd.get_loss(name, **OPTIONS.get(name, {}))) for name in otkd.list_losses()
}
LOSSES |= {
    "author": of_logits(otkd.SinKDLoss.author()),
    "top-k": of_logits(otkd.SinkhornLoss(MATRIX, support=TopK(2))),
    "sharp": of_logits(otkd.SinkhornLoss(MATRIX, value="sharp")),
    "marginal_relaxation": of_logits(otkd.SinkhornLoss(MATRIX, marginal_relaxation=1.0)),
    "ordinal": of_logits(otkd.WassersteinLoss("ordinal")),
    "function": functional.kl_divergence,
    "function of a batch": functional.batch_sinkhorn_distance,
    "Sinkhorn function": lambda s, t: functional.sinkhorn_divergence(s, t, cost=MATRIX),
}
TRANSPORTS = {
    "sinkhorn": lambda a, b: ot.sinkhorn(a, b, MATRIX).value,
    "divergence": lambda a, b: ot.sinkhorn_divergence(a, b, MATRIX),
    "sharp divergence": lambda a, b: ot.sinkhorn_divergence(a, b, MATRIX, value="sharp"),
    "wasserstein": lambda a, b: ot.wasserstein(a, b, MATRIX),
}
BOTH = {**LOSSES, **TRANSPORTS}


def pair(name):
    student, teacher = logits(1, 4, VOCAB).float(), logits(2, 4, VOCAB).float()
    return (student.softmax(-1), teacher.softmax(-1)) if name in TRANSPORTS else (student, teacher)


@pytest.mark.parametrize("name", BOTH)
def test_tensors_without_enough_digits_or_without_numbers(name):
    function, (student, teacher) = BOTH[name], pair(name)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(TypeError, match=f"must be float64, .* got {dtype}: convert it"):
            function(student.to(dtype), teacher.to(dtype))
        if name != "ce":
            with pytest.raises(TypeError, match=f"must be float64, .* got {dtype}: convert it"):
                function(student, teacher.to(dtype))
    with pytest.raises(ValueError, match="'meta', where tensors have no data"):
        function(student.to("meta"), teacher.to("meta"))
    with pytest.raises(TypeError, match="must be a floating-point tensor"):
        function(student.to(torch.complex64), teacher)


# Torch itself warns when it first differentiates forwards.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", BOTH)
def test_transforms_of_functions_are_refused(name):
    function, (student, teacher) = BOTH[name], pair(name)
    of_student = lambda x: function(x, teacher).sum()  # noqa: E731
    for run in (
        lambda: torch.func.vmap(of_student)(student.expand(2, *student.shape)),
        lambda: torch.func.grad(of_student)(student),
        lambda: torch.func.jacrev(of_student)(student),
        lambda: torch.func.jvp(of_student, (student,), (student,)),
    ):
        with pytest.raises(RuntimeError, match="Instead of vmap, add a batch dimension"):
            run()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        of_student(forward_ad.make_dual(student, student))


@pytest.mark.parametrize("name", [name for name in BOTH if name != "top-k"])
def test_vectorised_jacobians_are_those_row_by_row(name):
    function, (student, teacher) = BOTH[name], pair(name)
    of_student = lambda x: function(x, teacher).reshape(-1)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(
        jacobian(of_student, student, vectorize=True), jacobian(of_student, student)
    )


def test_a_vectorised_jacobian_of_top_k_is_refused():
    student, teacher = pair("top-k")
    with pytest.raises(RuntimeError, match="vectorize=False"):
        torch.autograd.functional.jacobian(
            lambda x: LOSSES["top-k"](x, teacher), student, vectorize=True
        )


@pytest.mark.parametrize("name", [name for name in BOTH if name != "ce"])
def test_second_derivatives_are_right_or_refused(name):
    function, (student, teacher) = BOTH[name], pair(name)
    leaf = student.clone().requires_grad_()
    value = function(leaf, teacher).sum()
    if name not in ("wasserstein", "ordinal"):  # whose gradient is piecewise that of a softmax
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(value, leaf, create_graph=True)


@pytest.mark.parametrize(
    "build",
    [
        otkd.costs.EmbeddingCost,
        lambda rows: otkd.costs.EmbeddingCost(points(1, VOCAB, 3).float(), rows),
        lambda rows: otkd.SinkhornLoss(embedding=rows),
        lambda rows: otkd.costs.MatrixCost(rows @ rows.mT if rows.dtype == torch.float32 else rows),
        lambda rows: otkd.alignment.fit_map(rows, points(1, VOCAB, 3).float()),
    ],
)
def test_embeddings_costs_and_stored_logits_likewise(build):
    rows = points(2, VOCAB, 3).float()
    build(rows)
    with pytest.raises(
        TypeError, match=r"must be float64, .* got torch\.float8_e4m3fn: convert it"
    ):
        build(rows.to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="'meta', where tensors have no data"):
        build(rows.to("meta"))


def test_stored_teachers_of_too_few_digits():
    dense = points(1, VOCAB, 3).float()
    stored = otkd.TopKTeacher.from_logits(dense, 2)
    for build in (
        lambda: otkd.DenseTeacher(dense.to(torch.float8_e5m2)),
        lambda: dataclasses.replace(stored, log_masses=stored.log_masses.to(torch.float8_e5m2)),
    ):
        with pytest.raises(TypeError, match=r"must be float64, .* got torch\.float8_e5m2: convert"):
            build()
