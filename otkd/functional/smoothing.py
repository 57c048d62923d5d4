"""The closed form of the transport KL with η = 1, in which every token is an atom of its own.

Let K = exp(−κ·C), and let q̃ = Kq and p̃ = Kp be the distributions smoothed over near tokens. Then
κ·U(q, p) = −Σ_j p_j·log q̃_j, and its distance to the tangent at p is

    κ·D(q, p) = Σ_j p_j·φ(q̃_j/p̃_j),    φ(x) = x − 1 − log x,

which is at least 0 term by term (the divergence of Itakura and Saito between q̃ and p̃, weighted with
p). The gradient in q is K(p/p̃ − p/q̃). Three products with K are all that is needed, so the kernel
may be over the whole vocabulary if its products are cheap. It is exact among the k most probable
tokens of student and teacher, and between a token and itself. Between two other tokens it has low
rank (:mod:`otkd.costs.background`). For every symmetric kernel D is at least 0, and 0 with gradient
0 at q = p. As the price grows it tends to KL(p‖q) over the whole vocabulary, if p > 0 wherever
q > 0. Without debiasing, the value is κ·U itself, whose gradient in q is −K(p/q̃).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from otkd.costs import Cost, EmbeddingCost
from otkd.costs.background import LowRankKernel, background_of
from otkd.functional.rowwise import DenseTeacher, Formula, Pair, Spread, compare_rowwise
from otkd.supports.base import Positions, over_temperature
from otkd.supports.heads import not_repeated, top_tokens, union_of

_LEAST_CLUSTERS = 16  # of an embedding; 64 take 1.8 times as long
# Above, a float32 sum over near tokens may have lost what little mass the student has there.
_STEEPEST = 1e25
# Below, a float64 sum has lost it, too. What is left is the larger of two bounds: the token's own
# mass, and what all mass gives it from the largest cost.
_NOTHING = 1e-290


def smoothed_kl(
    positions: Positions,
    mask: Tensor | None,
    *,
    cost: Cost,
    epsilon: float,
    debiased: bool,
    k: int,
    clusters: int,
) -> Tensor:
    """κ·D, or κ·U if not debiased, at every position, ``(positions,)``; 0 where masked.

    Args:
        positions: all positions, with the teacher's logits over the same vocabulary.
        mask: ``(positions,)``.
        cost: a constant, and symmetric.
        epsilon: 1/κ.
        debiased: whether to subtract the tangent at p.
        k: number of most probable tokens of each side among which the kernel is exact.
        clusters: least number of clusters of the vocabulary, for the kernel elsewhere.
    """
    if isinstance(cost, EmbeddingCost):
        clusters = max(clusters, _LEAST_CLUSTERS)
    settings = KernelSettings(cost, epsilon, k, clusters)
    return compare_rowwise(
        _Smoothed(debiased),
        positions.student,
        _Teacher(positions, settings),
        temperature=positions.temperature,
        mask=mask,
    )


@dataclass(frozen=True)
class KernelSettings:
    """What decides the kernel of a position.

    Attributes:
        cost: between tokens.
        epsilon: ε.
        k: number of most probable tokens of each side.
        clusters: of the vocabulary, for the kernel between other tokens.
    """

    cost: Cost
    epsilon: float
    k: int
    clusters: int
    _others: dict[torch.dtype, LowRankKernel] = field(default_factory=dict, init=False)

    def others(self, vocab: int, dtype: torch.dtype, device: torch.device) -> LowRankKernel:
        """The kernel between tokens that are not among the most probable ones."""
        if dtype not in self._others:
            background = background_of(self.cost, vocab, self.clusters, dtype, device)
            self._others[dtype] = background.kernel(self.epsilon)
        return self._others[dtype]

    def least_log_mass(self, vocab: int) -> float:
        """A lower bound of log Σ_i q_i·K_ij: that of all mass at the largest cost."""
        return -self.cost.largest(vocab, vocab) / self.epsilon

    def at(self, student: Tensor, teacher: Tensor) -> Kernel:
        """The kernel for the logits of a block of positions, ``(N, V)``."""
        tokens, counts = union_of(top_tokens(student, self.k), top_tokens(teacher, self.k))
        valid = not_repeated(tokens, counts)
        return Kernel(self, tokens, valid, student.shape[-1], student.dtype)


class Kernel:
    """exp(−C/ε) over the vocabulary at N positions.

    Args:
        settings: what it is made from.
        tokens: among which it is exact, ``(N, K)``.
        valid: False for repetitions of a token, ``(N, K)``.
        vocab: number of tokens, V.
        dtype: its precision.
    """

    def __init__(
        self,
        settings: KernelSettings,
        tokens: Tensor,
        valid: Tensor,
        vocab: int,
        dtype: torch.dtype,
    ) -> None:
        self._with_dtype = functools.partial(Kernel, settings, tokens, valid, vocab)
        self.least_log_mass = settings.least_log_mass(vocab)
        self._tokens, self._valid = tokens, valid
        costs = settings.cost.between(tokens, tokens, ("source", "target"), dtype)
        self._exact = (costs / -settings.epsilon).exp_()
        self._others = settings.others(vocab, dtype, tokens.device)

    def double(self) -> Kernel:
        """The same kernel in float64."""
        return self._with_dtype(torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """Σ_j K_ij·x_j, ``(N, V)``."""
        tokens, others = self._tokens, self._others
        clusters, scales = others.assignment[tokens], others.scales[tokens]
        head = x.gather(-1, tokens) * self._valid
        # Subtracting the head from the sum over all tokens would leave only its rounding error if
        # the tail has almost no mass.
        from_tail = x.scatter(-1, tokens, 0.0) @ others.members
        from_all = from_tail.scatter_add(-1, clusters, head * scales)
        of_head = torch.bmm(self._exact, head.unsqueeze(-1)).squeeze(-1)
        of_head += (from_tail @ others.between).gather(-1, clusters) * scales
        product = x * others.own
        product.addmm_(from_all @ others.between, others.members.mT)
        return product.scatter_(-1, tokens, of_head)


class SmoothedPair(Pair):
    """The distributions of a block of positions, with the kernel that smooths them."""

    def __init__(self, student: Tensor, teacher: Tensor, kernel: Kernel):
        super().__init__(student, teacher)
        self.kernel = kernel

    def double(self) -> SmoothedPair:
        """The same in float64."""
        return SmoothedPair(self._student.double(), self._teacher.double(), self.kernel.double())


class _Teacher(DenseTeacher):
    def __init__(self, positions: Positions, settings: KernelSettings):
        super().__init__(positions.teacher, positions.teacher_temperature)
        self._settings = settings

    def compare(
        self, student: Tensor, rows: slice | Tensor, formula: Formula
    ) -> tuple[Pair, Spread | None]:
        teacher = over_temperature(self.logits[rows], self.temperature, student.dtype)
        return SmoothedPair(student, teacher, self._settings.at(student, teacher)), None


class _Smoothed(Formula):
    caches_per_block: ClassVar[int] = 4

    def __init__(self, debiased: bool) -> None:
        self._debiased = debiased

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        assert isinstance(pair, SmoothedPair)
        smallest = torch.finfo(pair.q.dtype).tiny
        smoothed = pair.kernel(pair.q).clamp_(min=smallest)
        demand = pair.p / smoothed
        lost = None
        if _exceeds(demand, _STEEPEST):
            if demand.dtype == torch.float32:
                value, weighted = self(pair.double())
                return value.float(), weighted.float()
            lost = (smoothed < _NOTHING) & (pair.p > 0)
        least = pair.kernel.least_log_mass
        bound = pair.log_q if lost is None else pair.log_q.clamp(min=least)
        if self._debiased:
            reference = pair.kernel(pair.p).clamp_(min=smallest)
            ratio = smoothed.div_(reference)
            log_ratio = ratio.log()
            excess = ratio.sub_(1)
            pulled = demand.mul_(excess)  # p/p̃ − p/q̃
            if lost is not None:
                log_ratio = torch.where(lost, bound - reference.log(), log_ratio)
                pulled = torch.where(lost, pair.p / reference, pulled)
            per_token = log_ratio.neg_().add_(excess)
        else:
            log_smoothed, pulled = smoothed.log_(), demand.neg_()
            if lost is not None:
                log_smoothed = torch.where(lost, bound, log_smoothed)
                pulled = pulled.masked_fill_(lost, 0.0)
            per_token = log_smoothed.neg_()
        value = torch.linalg.vecdot(pair.p, per_token)
        weighted = pair.kernel(pulled).mul_(pair.q)
        if lost is not None:
            weighted -= pair.p.masked_fill(~lost | (pair.log_q < least), 0.0)
        return value, weighted


def _exceeds(values: Tensor, limit: float) -> bool:
    return values.numel() > 0 and bool(values.amax() > limit)
