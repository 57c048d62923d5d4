"""Shapes in signatures are true: they are checked while every public function is called."""

import subprocess
import sys

import pytest

HOOKED = """
import jaxtyping
with jaxtyping.install_import_hook("otkd", "beartype.beartype"):
    import otkd
import pytest
import torch
from otkd import functional as F, ot
from otkd.costs import DiscreteCost, EmbeddingCost, MatrixCost, OrdinalCost

torch.manual_seed(0)
called = set()
for shape in ((), (2, 3)):
    x, y, wide = torch.randn(*shape, 5), torch.randn(*shape, 5), torch.randn(*shape, 7)
    mask = torch.ones(shape, dtype=torch.bool)
    matrix = (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs()
    embedding, other = torch.randn(5, 4), torch.randn(7, 4)
    costs = (matrix, MatrixCost(matrix), DiscreteCost(), OrdinalCost(2.0), EmbeddingCost(embedding))
    transport = (
        "sinkhorn_divergence",
        "transport_kl_divergence",
        "wasserstein_distance",
        "batch_sinkhorn_distance",
    )
    for name in set(F.__all__) - set(transport):
        for student in (x, x.bfloat16(), x.double(), x.clone().requires_grad_()):
            value = getattr(F, name)(student, y, temperature=2.0, mask=mask)
            assert value.shape == shape
        called.add(name)
    assert F.universal_logit_distance(x, wide).shape == shape
    bridge = EmbeddingCost(embedding, other)
    for name in transport[:3]:
        for cost in costs:
            function = getattr(F, name)
            assert function(x, y, cost=cost, mask=mask, teacher_temperature=2.0).shape == shape
        assert function(x, wide, cost=bridge).shape == shape
        called.add(name)
    a, b, c = x.softmax(-1), y.softmax(-1), wide.softmax(-1)
    rectangular = torch.rand(5, 7)
    for cost in (*costs, matrix.expand(*shape, 5, 5)):
        solution = ot.sinkhorn(a, b, cost, epsilon=0.5)
        assert solution.value.shape == solution.marginal_error.shape == shape
        assert solution.f.shape == (*shape, 5)
        assert solution.plan().shape == (*shape, 5, 5)
        assert ot.wasserstein(a, b, cost, p=2.0).shape == shape
        assert ot.sinkhorn_divergence(a, b, cost, epsilon=0.5).shape == shape
    three = bridge.matrices(5, 7, dtype=a.dtype, device=a.device, self_terms=True)
    for cost in (bridge, tuple(three)):
        assert ot.sinkhorn_divergence(a, c, cost, epsilon=0.5).shape == shape
    relaxed = {"marginal_relaxation": (0.5, None), "debias": "teacher"}
    assert ot.sinkhorn_divergence(a, b, matrix, **relaxed).shape == shape
    assert ot.sinkhorn_divergence(a, c, rectangular, debias=False).shape == shape
    assert ot.sinkhorn(a, c, rectangular).plan().shape == (*shape, 5, 7)
    assert ot.wasserstein(a, c, rectangular).shape == shape
    if shape:
        for options in ({}, {"debias": True}, {"cost": "sqeuclidean", "value": "sharp"}):
            assert F.batch_sinkhorn_distance(x, y, **options).shape == shape[:-1]
        called.add("batch_sinkhorn_distance")
assert called == set(F.__all__), set(F.__all__) - called
from otkd import alignment
narrow, wide_rows = torch.randn(22, 3), torch.randn(25, 5)
ids = torch.arange(20)
for student in (narrow, narrow.bfloat16(), narrow.double()):
    mapped, found = alignment.align_embeddings(student, wide_rows, anchors=(ids, ids))
    assert mapped.shape == found.apply(student).shape == (22, 5)
    assert alignment.aligned_cost(student, wide_rows, anchors=(ids, ids))(22, 25).shape == (22, 25)
for broken in (
    lambda: F.sinkhorn_divergence(x, y[:1], cost=matrix),
    lambda: ot.sinkhorn(a, b, matrix.long()),
    lambda: EmbeddingCost(embedding[0]),
):
    with pytest.raises(jaxtyping.TypeCheckError):  # the hook is at work
        broken()
print("all called")
"""

OPTIONAL = {
    *("accelerate", "datasets", "geomloss", "matplotlib", "ot", "pandas", "pykeops", "rich"),
    *("safetensors", "sklearn", "torchmetrics", "transformers", "trl", "typer"),
}

BARE = f"""
import sys
import torch
before = set(sys.modules)
import otkd
loaded = set(sys.modules) - before
print(sorted(loaded & {OPTIONAL!r}))
"""


def run(program: str) -> str:
    command = [sys.executable, "-W", "error::UserWarning:otkd", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_every_public_function_keeps_its_annotations():
    for package in ("beartype", "ot"):
        pytest.importorskip(package)
    assert run(HOOKED).endswith("all called")


def test_importing_otkd_after_torch_loads_nothing_optional():
    assert run(BARE) == "[]"
