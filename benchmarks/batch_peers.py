"""Transport between the samples of a batch by otkd and others: value and gradient.

A peer maps logits ``(b, d)`` of student and teacher to one differentiable value. The ground cost is
between softmax(logits / 2), ε is 0.1 unless stated otherwise, and the masses are 1/b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from peers import installed
from torch import Tensor

import otkd

EPSILON, TEMPERATURE = 0.1, 2.0
_NEVER = 1e-30  # a tolerance that is never reached, so that all iterations are made
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BatchSpec:
    """Sizes and seed of logits: normals, with a teacher that is the student plus noise."""

    samples: int
    classes: int
    cost: str = "l1"
    seed: int = 0
    dtype: str = "float32"
    epsilon: float = EPSILON
    device: str = "cpu"

    @property
    def name(self) -> str:
        """What a case is called in the results."""
        return f"b = {self.samples:,}, d = {self.classes:,}, {self.cost}"

    @property
    def matrix_bytes(self) -> int:
        """b·b·4, the unit in which memory is reported."""
        return 4 * self.samples**2


@lru_cache(maxsize=1)
def build(spec: BatchSpec) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher."""
    generator = torch.Generator().manual_seed(spec.seed)
    student = 2 * torch.randn(spec.samples, spec.classes, generator=generator)
    teacher = student + torch.randn(student.shape, generator=generator)
    dtype = getattr(torch, spec.dtype)
    return student.to(spec.device, dtype), teacher.to(spec.device, dtype)


@dataclass(frozen=True)
class BatchPeer:
    """One implementation with its settings, by name: it can be sent to another process.

    Attributes:
        name: what it is called in the results.
        kind: a key of ``KINDS``.
        settings: for that kind.
        largest: the largest batch that it is run on.
    """

    name: str
    kind: str
    settings: dict = field(default_factory=dict)
    largest: int = 1 << 30

    @property
    def available(self) -> bool:
        """Whether the package it needs is installed."""
        return installed(self.kind)


class BatchCall:
    """Computes the value and its gradient in the student's logits, each time anew."""

    def __init__(self, peer: BatchPeer, spec: BatchSpec):
        self.function = KINDS[peer.kind](spec, **peer.settings)
        self.student, self.teacher = build(spec)

    def __call__(self) -> tuple[Tensor, Tensor]:
        student = self.student.detach().requires_grad_()
        value = self.function(student, self.teacher)
        value.backward()
        return value.detach(), student.grad


def prepare_job(arguments: dict, *, tiny: bool) -> BatchCall:
    """The call of another process; ``tiny`` for its warm-up. See :func:`measure.peak_memory`."""
    spec = BatchSpec(**arguments["spec"])
    if tiny:
        spec = replace(spec, samples=4, classes=min(spec.classes, 8))
    return BatchCall(BatchPeer(**arguments["peer"]), spec)


def _points(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return (student / TEMPERATURE).softmax(-1), (teacher / TEMPERATURE).softmax(-1)


def _distances(spec: BatchSpec, q: Tensor, p: Tensor) -> Tensor:
    distances = torch.cdist(q, p, p=1 if spec.cost == "l1" else 2)
    return distances if spec.cost == "l1" else distances.square()


def _otkd(
    spec: BatchSpec,
    *,
    iterations: int | None = None,
    tolerance: float = 1e-4,
    value: str = "dual",
) -> Function:
    limits = {"tolerance": tolerance, "max_iterations": 2000}
    if iterations is not None:
        limits = {"tolerance": _NEVER, "max_iterations": iterations}
    return otkd.BatchSinkhornLoss(
        spec.cost,
        temperature=TEMPERATURE,
        epsilon=spec.epsilon,
        debias=False,
        value=value,
        **limits,
    )


def _unrolled(spec: BatchSpec, *, iterations: int) -> Function:
    """The arithmetic of SinKD's public code: autograd through every iteration."""

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = _points(student, teacher)
        distances = _distances(spec, q, p)
        plan = torch.exp(-distances / spec.epsilon)
        for _ in range(iterations):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        return (plan * distances).sum() / len(q)

    return function


def _pot(spec: BatchSpec, *, iterations: int, threshold: float = 0.0) -> Function:
    """``ot.sinkhorn``; the gradient is its plan, by the envelope theorem."""
    import ot

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = _points(student, teacher)
        distances = _distances(spec, q, p)
        uniform = distances.new_full((len(q),), 1 / len(q))
        with torch.no_grad():
            plan = ot.sinkhorn(
                uniform, uniform, distances, spec.epsilon,
                numItermax=iterations, stopThr=threshold, warn=False,
            )  # fmt: skip
            entropy = (plan * (plan * len(q) ** 2).clamp(min=1e-30).log()).sum()
        return (plan * distances).sum() + spec.epsilon * entropy

    return function


def _pot_batch(spec: BatchSpec, *, iterations: int, method: str = "sinkhorn") -> Function:
    """``ot.batch.solve_batch`` on a batch of one problem; the gradient is its plan."""
    import ot

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = _points(student, teacher)
        distances = _distances(spec, q, p)
        uniform = distances.new_full((1, len(q)), 1 / len(q))
        with torch.no_grad():
            plan = ot.batch.solve_batch(
                distances[None], spec.epsilon, uniform, uniform,
                max_iter=iterations, tol=0.0, method=method, reg_type="kl",
            ).plan[0]  # fmt: skip
        return (plan * distances).sum()

    return function


def _emd(spec: BatchSpec) -> Function:
    """``ot.emd``, exact; the gradient is its plan."""
    import ot

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = _points(student, teacher)
        distances = _distances(spec, q, p)
        uniform = distances.new_full((len(q),), 1 / len(q))
        with torch.no_grad():
            plan = ot.emd(uniform, uniform, distances, numItermax=10_000_000)
        return (plan * distances).sum()

    return function


def _geomloss(spec: BatchSpec, *, scaling: float = 0.9, backend: str = "tensorized") -> Function:
    """``SamplesLoss`` on the tensors, or with KeOps ``"online"``; ε is blur**p."""
    from geomloss import SamplesLoss

    def distances(x: Tensor, y: Tensor) -> Tensor:
        return _distances(spec, x, y)

    formula = "Sum(Abs(X-Y))" if spec.cost == "l1" else "SqDist(X,Y)"
    cost = formula if backend == "online" else distances
    p = 1 if spec.cost == "l1" else 2
    blur = spec.epsilon if p == 1 else spec.epsilon**0.5
    loss = SamplesLoss(
        "sinkhorn", p=p, blur=blur, scaling=scaling, debias=False, cost=cost, backend=backend
    )

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        value = loss(*_points(student, teacher))
        torch.set_grad_enabled(True)  # geomloss may leave it disabled
        return value

    return function


def _kl_div(spec: BatchSpec) -> Function:
    def function(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = ((z / TEMPERATURE).log_softmax(-1) for z in (student, teacher))
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    return function


KINDS: dict[str, Callable[..., Function]] = {
    "otkd": _otkd,
    "unrolled": _unrolled,
    "pot": _pot,
    "pot_batch": _pot_batch,
    "emd": _emd,
    "geomloss": _geomloss,
    "kl_div": _kl_div,
}
