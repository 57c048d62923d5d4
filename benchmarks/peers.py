"""The implementations that are compared: each maps logits to one differentiable value per position.

A peer is made once for a problem, which may prepare what a user would prepare once, such as a loss
with its embedding. It is then called with logits of student and teacher, ``(N, V)``.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from divergence_peers import DIVERGENCES
from problems import Function, Problem, Spec, build
from torch import Tensor

import otkd
from otkd.supports import Dense, NearestNeighbours, TopK

EPSILON = 0.1

# The package that a kind of peer needs.
_PACKAGES = {
    **dict.fromkeys(("pot", "pot_batch", "emd"), "ot"),
    "geomloss": "geomloss",
    "trl_jsd": "trl",
    "trl_chunked": "trl.kernels.chunked_divergence",
    "torchdistill": "torchdistill",
    "liger": "liger_kernel",
}


def installed(kind: str | None) -> bool:
    """Whether the package that this kind of peer needs is installed; true if it needs none."""
    needed = _PACKAGES.get(kind) if kind else None
    try:
        return needed is None or importlib.util.find_spec(needed) is not None
    except ModuleNotFoundError:  # the package that contains the module
        return False


@dataclass(frozen=True)
class Peer:
    """One implementation with its settings, by name: it can be sent to another process.

    Attributes:
        name: what it is called in the results.
        kind: a key of ``KINDS``.
        settings: for that kind.
        positions: how many of the problem's positions it runs on, None for all. Its time is scaled
            to all positions.
        rounds: how often it is timed, None for as often as the others.
        scale: a further factor of its time, for a peer that makes only a part of the iterations.
    """

    name: str
    kind: str
    settings: dict = field(default_factory=dict)
    positions: int | None = None
    rounds: int | None = None
    scale: float = 1.0

    @property
    def available(self) -> bool:
        """Whether the package it needs is installed."""
        return installed(self.kind)


@dataclass(frozen=True)
class Call:
    """Computes the values and their gradient in the student's logits, each time anew."""

    function: Function
    student: Tensor
    teacher: Tensor

    def __call__(self) -> tuple[Tensor, Tensor]:
        student = self.student.detach().requires_grad_()
        values = self.function(student, self.teacher)
        values.sum().backward()
        return values.detach(), student.grad

    @property
    def report(self):
        """The solver's report on the last call; None for a loss without one."""
        return getattr(self.function, "last_report", None)


def prepare(peer: Peer, spec: Spec) -> Call:
    """The call of a peer on its positions of a problem."""
    problem = build(spec)
    rows = slice(0, peer.positions)
    function = KINDS[peer.kind](problem, **peer.settings)
    return Call(function, problem.student[rows], problem.teacher[rows])


def prepare_job(arguments: dict, *, tiny: bool) -> Call:
    """The call of another process; ``tiny`` for its warm-up. See :func:`measure.peak_memory`."""
    spec = Spec(**arguments["spec"])
    if tiny:
        spec = replace(spec, vocab=64, positions=2)
    return prepare(Peer(**arguments["peer"]), spec)


def _otkd_sinkhorn(
    problem: Problem,
    *,
    k: int | None = None,
    clusters: int = 1,
    neighbours: int | None = None,
    first_tokens: int | None = None,
    epsilon: float = EPSILON,
    **options,
) -> Function:
    support = Dense() if k is None else TopK(k, clusters=clusters)
    if neighbours is not None:
        support = NearestNeighbours(neighbours)
    loss = otkd.SinkhornLoss(
        embedding=problem.embedding[:first_tokens],
        epsilon=epsilon,
        support=support,
        reduction="none",
        **options,
    )
    if first_tokens is None:
        return loss
    return lambda student, teacher: loss(student[:, :first_tokens], teacher[:, :first_tokens])


def _otkd_transport_kl(problem: Problem, **options) -> Function:
    return otkd.TransportKLLoss(embedding=problem.embedding, reduction="none", **options)


def mean_normalised_cost(embedding: Tensor) -> Tensor:
    """|x_i − x_j|² divided by its mean, without otkd's code."""
    centred = embedding.double() - embedding.double().mean(0)
    cost = torch.cdist(centred, centred).square_()
    return (cost / cost.mean()).fill_diagonal_(0).to(embedding.dtype)


def _potentials_loss(q: Tensor, f: Tensor, constant: Tensor) -> Tensor:
    """A value whose gradient in q is f, by the envelope theorem."""
    return (q * f.detach()).sum(-1) + constant.detach()


def _pot(
    problem: Problem, *, threshold: float, max_iterations: int, epsilon: float = EPSILON
) -> Function:
    """``ot.sinkhorn2`` three times per position, with the gradient by the envelope theorem.

    POT's own gradients are unrolled through the iterations, or wrong.
    """
    import ot

    cost = mean_normalised_cost(problem.embedding)

    def solve(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about reaching max_iterations
            _, log = ot.sinkhorn2(
                a, b, cost, epsilon, stopThr=threshold, numItermax=max_iterations, log=True
            )
        # P = diag(u)·K·diag(v) here, and a_i·b_j·exp((f_i + g_j − C_ij)/ε) in otkd.
        f = epsilon * (log["u"].reshape(-1).log() - a.log())
        g = epsilon * (log["v"].reshape(-1).log() - b.log())
        shift = ((b * g).sum() - (a * f).sum()) / 2
        return f + shift, g - shift

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = student.softmax(-1), teacher.softmax(-1)
        values = []
        for a, b in zip(q, p, strict=True):
            with torch.no_grad():
                # Masses below float32's smallest normal number divide 0 by 0 in its iterations.
                a0, b0 = a.detach().clamp(min=1e-30), b.clamp(min=1e-30)
                (f, g), (f_aa, g_aa), (f_bb, g_bb) = solve(a0, b0), solve(a0, a0), solve(b0, b0)
                f_self = (f_aa + g_aa) / 2
                constant = (b0 * (g - (f_bb + g_bb) / 2)).sum()
            values.append(_potentials_loss(a, f - f_self, constant))
        return torch.stack(values)

    return function


def _geomloss(
    problem: Problem, *, scaling: float, backend: str = "tensorized", epsilon: float = EPSILON
) -> Function:
    """``SamplesLoss`` for one position at a time: tensorized, it holds four costs per position."""
    from geomloss import SamplesLoss

    embedding = problem.embedding
    scale = 2 * (embedding - embedding.mean(0)).square().sum(-1).mean()
    points = embedding * (2 / scale).sqrt()  # its cost is |x − y|²/2
    loss = SamplesLoss("sinkhorn", p=2, blur=epsilon**0.5, scaling=scaling, backend=backend)

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = student.softmax(-1), teacher.softmax(-1)
        pairs = zip(q, p, strict=True)
        return torch.stack([loss(a, points, b, points) for a, b in pairs])

    return function


def _unrolled(problem: Problem, *, iterations: int, log_domain: bool = False) -> Function:
    """Autograd through every iteration, with matrix products or with log-sum-exp."""
    cost = mean_normalised_cost(problem.embedding)

    def products(a: Tensor, b: Tensor) -> Tensor:
        kernel = torch.exp(cost / -EPSILON)
        v = torch.ones_like(b)
        for _ in range(iterations):
            u = 1 / ((b * v) @ kernel.mT)
            v = 1 / ((a * u) @ kernel)
        return EPSILON * ((a * u.log()).sum(-1) + (b * v.log()).sum(-1))

    def logarithms(a: Tensor, b: Tensor) -> Tensor:
        log_a, log_b, scaled = a.log(), b.log(), cost / EPSILON
        g = torch.zeros_like(b)
        for _ in range(iterations):
            f = -(log_b.unsqueeze(-2) + g.unsqueeze(-2) - scaled).logsumexp(-1)
            g = -(log_a.unsqueeze(-2) + f.unsqueeze(-2) - scaled.mT).logsumexp(-1)
        return EPSILON * ((a * f).sum(-1) + (b * g).sum(-1))

    solve = logarithms if log_domain else products

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = student.softmax(-1), teacher.softmax(-1)
        return solve(q, p) - solve(q, q) / 2 - solve(p, p) / 2

    return function


KINDS: dict[str, Callable[..., Function]] = {
    "otkd_sinkhorn": _otkd_sinkhorn,
    "otkd_transport_kl": _otkd_transport_kl,
    "pot": _pot,
    "geomloss": _geomloss,
    "unrolled": _unrolled,
    **DIVERGENCES,
}
