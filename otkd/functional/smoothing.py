"""The closed form of the transport KL with η = 1, in which every token is an atom of its own.

Let K = exp(−κ·C) and let q̃ = Kᵀq and p̃ = Kᵀp be the distributions smoothed over near tokens. Then

    κ·U(q, p) = −Σ_j p_j·log q̃_j,        κ·D(q, p) = Σ_j p_j·φ(q̃_j/p̃_j),   φ(x) = x − 1 − log x,

which is at least 0 term by term (Itakura and Saito's divergence of q̃ and p̃, weighted with p). The
gradient in q is K(p/p̃ − p/q̃). One product with K for each of q̃, p̃ and the gradient is all that is
needed, so the kernel may be over the whole vocabulary if its products are cheap. It is exact among
the k most probable tokens of student and teacher, and between a token and itself. Between two other
tokens it has low rank (:mod:`otkd.costs.background`). Whatever the kernel is, D is at least 0, and
0 with gradient 0 at q = p, and it tends to KL(p‖q) over the whole vocabulary as the price grows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.costs import Cost, EmbeddingCost
from otkd.costs.background import Background, background_of
from otkd.functional.rowwise import DenseTeacher, Formula, Pair, Spread, compare_rowwise
from otkd.supports.base import Positions, over_temperature
from otkd.supports.heads import top_tokens, union_of

_LEAST_CLUSTERS = 16  # of an embedding: enough for any price, and as fast as one
# Above, a float32 sum over near tokens may have lost what little mass the student has there.
_STEEPEST = 1e25
# Below, a float64 sum has lost it, too; what is left of it is the token's own mass.
_NOTHING = 1e-290


def smoothed_kl(
    positions: Positions,
    mask: Tensor | None,
    *,
    cost: Cost,
    epsilon: float,
    k: int,
    clusters: int,
    debiased: bool,
) -> Tensor:
    """κ·D, or κ·U if not debiased, at every position, ``(positions,)``; 0 where masked.

    Args:
        positions: all positions, with the teacher's logits over the same vocabulary.
        mask: ``(positions,)``.
        cost: a constant.
        epsilon: 1/κ.
        k: number of most probable tokens of each side among which the kernel is exact.
        clusters: least number of clusters of the vocabulary, for the kernel elsewhere.
        debiased: whether to return D.
    """
    if isinstance(cost, EmbeddingCost):
        clusters = max(clusters, _LEAST_CLUSTERS)
    settings = KernelSettings(cost, epsilon, k, clusters)
    return compare_rowwise(
        _Smoothed(debiased=debiased),
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

    def at(self, student: Tensor, teacher: Tensor) -> Kernel:
        """The kernel for the logits of a block of positions, ``(N, V)``."""
        tokens, counts = union_of(top_tokens(student, self.k), top_tokens(teacher, self.k))
        valid = torch.arange(tokens.shape[-1], device=tokens.device) < counts.unsqueeze(-1)
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
        self._tokens, self._valid = tokens, valid
        costs = settings.cost.between(tokens, tokens, ("source", "target"), dtype)
        self._exact = (costs / -settings.epsilon).exp_()
        self._background = background_of(
            settings.cost, vocab, settings.epsilon, settings.clusters, dtype, tokens.device
        )

    def double(self) -> Kernel:
        """The same kernel in float64."""
        return self._with_dtype(torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """Σ_j K_ij·x_j, ``(N, V)``."""
        return self._product(x, self._exact, self._background)

    def transposed(self, x: Tensor) -> Tensor:
        """Σ_i K_ij·x_i, ``(N, V)``."""
        return self._product(x, self._exact.mT, self._background.transposed)

    def _product(self, x: Tensor, exact: Tensor, background: Background) -> Tensor:
        tokens, clusters = self._tokens, background.assignment[self._tokens]
        head = x.gather(-1, tokens) * self._valid
        tail = x.scatter(-1, tokens, 0.0)
        from_tail = tail @ background.columns
        scaled = head * _own_column(background.columns, tokens, clusters)
        from_all = from_tail.scatter_add(-1, clusters, scaled)
        to_head, to_tail = (part @ background.between.mT for part in (from_tail, from_all))
        of_head = torch.bmm(exact, head.unsqueeze(-1)).squeeze(-1)
        of_head += to_head.gather(-1, clusters) * _own_column(background.rows, tokens, clusters)
        product = torch.addmm(tail.mul_(background.own), to_tail, background.rows.mT)
        return product.scatter_(-1, tokens, of_head)


def _own_column(matrix: Tensor, tokens: Tensor, clusters: Tensor) -> Tensor:
    return matrix[tokens, clusters]


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


@dataclass(frozen=True, kw_only=True)
class _Smoothed(Formula):
    debiased: bool

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        assert isinstance(pair, SmoothedPair)
        smoothed = pair.kernel.transposed(pair.q)
        smallest = torch.finfo(smoothed.dtype).tiny
        demand = pair.p / smoothed.clamp_(min=smallest)
        if demand.dtype == torch.float32 and demand.amax() > _STEEPEST:
            value, weighted = self(pair.double())
            return value.float(), weighted.float()
        log_smoothed, lost = smoothed.log(), None
        if demand.dtype == torch.float64 and demand.amax() > _STEEPEST:
            lost = (smoothed < _NOTHING) & (pair.p > 0)
            log_smoothed = torch.where(lost, pair.log_q, log_smoothed)
            demand = demand.masked_fill(lost, 0.0)
        if self.debiased:
            reference = pair.kernel.transposed(pair.p).clamp_(min=smallest)
            ratio = smoothed.div_(reference)
            log_ratio = log_smoothed.sub_(reference.log())
            value = torch.linalg.vecdot(pair.p, ratio.sub(1).sub_(log_ratio))
            demand.sub_(pair.p / reference)
        else:
            value = -torch.linalg.vecdot(pair.p, log_smoothed)
        weighted = pair.kernel(demand).mul_(pair.q).neg_()
        if lost is not None:
            weighted -= pair.p.masked_fill(~lost, 0.0)
        return value, weighted
