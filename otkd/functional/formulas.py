"""The formulas of the divergences: value and q·∂D/∂q from q, p and their logarithms.

p is the teacher's distribution and q the student's. Each formula is a frozen dataclass with the
parameters of its divergence, which are checked in the constructor. Their names and defaults are
those of the functions in :mod:`otkd.functional.divergences`, which give the mathematics and its
sources. Any multiple of q may be added to the second result, because the softmax removes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from otkd.functional.rowwise import LOG_ZERO, Formula, Pair
from otkd.scalars import as_number, settle

_HEAD = 64  # the head is first looked for among so many tokens


@dataclass(frozen=True, kw_only=True)
class KL(Formula):
    """See :func:`otkd.functional.kl_divergence`."""

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        return (pair.log_p - pair.log_q).mul_(pair.p).sum(-1), pair.q - pair.p


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Formula):
    """See :func:`otkd.functional.reverse_kl_divergence`."""

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        weighted = (pair.log_q - pair.log_p).mul_(pair.q)
        return weighted.sum(-1), weighted


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Formula):
    """See :func:`otkd.functional.jensen_shannon_divergence`."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        settle(self, beta=as_number("beta", self.beta))
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta must lie strictly between 0 and 1, got {self.beta!r}. At 0 and 1 the "
                "divergence is 0 everywhere; use KL or reverse KL for its scaled limits"
            )

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        log_m = _mixture(pair.p, pair.q, self.beta).log_()
        student_part = (pair.log_q - log_m).mul_(pair.q).mul_(1 - self.beta)
        teacher_part = (pair.log_p - log_m).mul_(pair.p)
        return self.beta * teacher_part.sum(-1) + student_part.sum(-1), student_part


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Formula):
    """See :func:`otkd.functional.total_variation_distance`."""

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        difference = pair.difference
        value = difference.abs().sum(-1) / 2
        return value, difference.sign_().mul_(pair.q).div_(2)


@dataclass(frozen=True, kw_only=True)
class Hellinger(Formula):
    """See :func:`otkd.functional.hellinger_divergence`."""

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        # Roots from logarithms: they are accurate also where q or p underflows.
        root = (pair.log_q / 2).exp_()
        difference = root - (pair.log_p / 2).exp_()
        return difference.square().sum(-1), root.mul_(difference)


@dataclass(frozen=True, kw_only=True)
class SkewKL(Formula):
    """See :func:`otkd.functional.skew_kl_divergence`."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        settle(self, alpha=_as_skew(self.alpha))

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        if self.alpha == 0:
            return KL()(pair)
        p, q = pair.p, pair.q
        m = _mixture(p, q, self.alpha)
        # q·(1 − p/m)
        weighted = torch.addcmul(q, p / m, q, value=-1).mul_(1 - self.alpha)
        return (pair.log_p - m.log_()).mul_(p).sum(-1), weighted


@dataclass(frozen=True, kw_only=True)
class SkewReverseKL(Formula):
    """See :func:`otkd.functional.skew_reverse_kl_divergence`."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        settle(self, alpha=_as_skew(self.alpha))

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        if self.alpha == 0:
            return ReverseKL()(pair)
        q = pair.q
        m = _mixture(q, pair.p, self.alpha)
        ratio = q / m
        log_ratio = pair.log_q - m.log_()
        return (q * log_ratio).sum(-1), q * (log_ratio - self.alpha * ratio)


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(Formula):
    """See :func:`otkd.functional.adaptive_kl_divergence`."""

    head_mass: float = 0.5

    def __post_init__(self) -> None:
        settle(self, head_mass=as_number("head_mass", self.head_mass))
        if not 0 <= self.head_mass <= 1:
            raise ValueError(f"head_mass must lie between 0 and 1, got {self.head_mass!r}")

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        p, q = pair.p, pair.q
        gap = (p - q).abs()
        tokens = slice(p.shape[-1] - pair.tail)  # the tail atom is never in the head
        head_gap = _sum_over_head(gap[:, tokens], p[:, tokens], self.head_mass)
        total_gap = gap.sum(-1, keepdim=True)
        head_weight = torch.where(total_gap > 0, head_gap / total_gap, 0.5).clamp(max=1)
        log_ratio = pair.log_q - pair.log_p
        reverse = q * log_ratio
        value = (1 - head_weight) * reverse - head_weight * p * log_ratio
        return value.sum(-1), head_weight * (q - p) + (1 - head_weight) * reverse


@dataclass(frozen=True, kw_only=True)
class AlphaBeta(Formula):
    """See :func:`otkd.functional.alpha_beta_divergence`."""

    alpha: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        settle(self, alpha=as_number("alpha", self.alpha), beta=as_number("beta", self.beta))
        if not (math.isfinite(self.alpha) and math.isfinite(self.beta)):
            raise ValueError(f"alpha and beta must be finite, got {self.alpha!r} and {self.beta!r}")

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        log_q, log_p = pair.log_q.double(), pair.log_p.double()
        # A token without mass on either side adds nothing, but powers of 0 may be infinite.
        absent = (log_q <= LOG_ZERO) & (log_p <= LOG_ZERO)
        log_q, log_p = log_q.masked_fill_(absent, 0), log_p.masked_fill_(absent, 0)
        return self._value(log_q, log_p), self._weighted_gradient(log_q, log_p)

    def _value(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        alpha, beta = self.alpha, self.beta
        log_ratio = log_p - log_q
        if _vanishes(alpha) and _vanishes(beta):
            return log_ratio.square().sum(-1) / 2
        if _vanishes(beta):
            p, q = (alpha * log_p).exp(), (alpha * log_q).exp()
            return (p * alpha * log_ratio - p + q).sum(-1) / alpha**2
        if _vanishes(alpha):
            p, q = (beta * log_p).exp(), (beta * log_q).exp()
            return (p - q - q * beta * log_ratio).sum(-1) / beta**2
        if _vanishes(alpha + beta):
            return ((alpha * log_ratio).exp() - 1 - alpha * log_ratio).sum(-1) / alpha**2
        total = alpha + beta
        mixed = (alpha * log_p + beta * log_q).exp()
        p, q = (total * log_p).exp(), (total * log_q).exp()
        return (alpha / total * p + beta / total * q - mixed).sum(-1) / (alpha * beta)

    def _weighted_gradient(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        alpha, beta = self.alpha, self.beta
        if _vanishes(alpha):
            return (beta * log_q).exp() * (log_q - log_p)
        power_q = ((alpha + beta) * log_q).exp()
        return (power_q - (alpha * log_p + beta * log_q).exp()) / alpha


@dataclass(frozen=True, kw_only=True)
class UniversalLogit(Formula):
    """See :func:`otkd.functional.universal_logit_distance`."""

    same_vocabulary: ClassVar[bool] = False

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        if pair.tail:  # the atoms are sorted already
            return pair.difference.abs().sum(-1), pair.difference.sign().mul_(pair.q)
        q, order = pair.q.sort(-1, descending=True)
        p = pair.p.sort(-1, descending=True).values
        longer = max(q.shape[-1], p.shape[-1])
        difference = pad(q, (0, longer - q.shape[-1])) - pad(p, (0, longer - p.shape[-1]))
        sign = difference[..., : q.shape[-1]].sign()
        return difference.abs().sum(-1), torch.zeros_like(q).scatter_(-1, order, q * sign)


def _sum_over_head(values: Tensor, p: Tensor, mass: float, most: int = _HEAD) -> Tensor:
    """Sums of values over the top tokens until their mass exceeds ``mass``, ``(positions, 1)``.

    Among equally probable tokens the first comes first. The head of a trained teacher is short, so
    it is first looked for among the ``most`` most probable tokens. All tokens are sorted only if
    the head continues beyond them, or ends among equally probable tokens.
    """
    everything = most >= p.shape[-1]
    if everything:
        heaviest, order = p.sort(dim=-1, descending=True, stable=True)
    else:
        heaviest, order = p.topk(most, dim=-1)
    in_head = heaviest.cumsum(-1) - heaviest <= mass
    sums = (values.gather(-1, order) * in_head).sum(-1, keepdim=True)
    if everything:
        return sums
    count = in_head.sum(-1, keepdim=True)
    unsure = (p >= heaviest.gather(-1, count - 1)).sum(-1, keepdim=True) != count
    rows = (unsure | (count == most)).squeeze(-1).nonzero().squeeze(-1)
    if len(rows):
        sums[rows] = _sum_over_head(values[rows], p[rows], mass, p.shape[-1])
    return sums


def _as_skew(alpha: float) -> float:
    alpha = as_number("alpha", alpha)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and below 1, got {alpha!r}")
    return alpha


def _vanishes(exponent: float) -> bool:
    """Whether the exponent is so small that the general formula would lose all digits."""
    return abs(exponent) < 1e-6


def _mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """w·a + (1−w)·b, clamped above 0 so that its logarithm is finite.

    For w = ½ the result is bitwise symmetric in a and b, which ``torch.lerp`` is not. At a = b both
    forms give a.
    """
    mixed = torch.add(a, b).div_(2) if weight == 0.5 else torch.lerp(b, a, weight)
    return mixed.clamp_(min=torch.finfo(a.dtype).tiny)
