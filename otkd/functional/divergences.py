"""Divergences between next-token distributions, p of the teacher and q of the student.

Each is a plain function ``f(student_logits, teacher_logits, *, temperature=1.0, …)`` that returns
one value per position, ``(*batch,)``, in nats (TVD and ULD: in probability). Common arguments:

    student_logits: ``(*batch, vocab)``, any floating dtype; the arithmetic is float32, or float64
        for float64 logits.
    teacher_logits: ``(*batch, vocab)``; a constant: no gradient flows to it.
    temperature: divides the logits of both before the softmax.
    teacher_temperature: divides the teacher's logits instead, where given.
    mask: ``(*batch,)``; where it is zero the value is 0 and the logits may hold anything.

All raise ``TypeError`` or ``ValueError`` for logits of different shapes, for parameters out of
range and for NaN in a counted position. Log-probabilities are floored at ``rowwise.LOG_ZERO``
(−10⁵): a divergence that is truly infinite is large and finite, with the analytic gradient.

What is written here is the formula alone: value and q·∂D/∂q from q, p and their logarithms, where
any multiple of q may be added to the latter (the softmax removes it).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from otkd.functional.rowwise import Formula, divergence

_HEAD = 64  # tokens among which to look first for half of the mass


@divergence()
def kl_divergence() -> Formula:
    """KL(p‖q) = Σ p·log(p/q), with gradient (q − p)/T in the student's logits.

    Source: Hinton, Vinyals and Dean (2015), "Distilling the Knowledge in a Neural Network".
    """

    def formula(pair):
        return (pair.log_p - pair.log_q).mul_(pair.p).sum(-1), pair.q - pair.p

    return formula


@divergence()
def reverse_kl_divergence() -> Formula:
    """KL(q‖p) = Σ q·log(q/p); mode-seeking.

    Source: Gu et al. (2024), "MiniLLM: Knowledge Distillation of Large Language Models".
    """

    def formula(pair):
        weighted = (pair.log_q - pair.log_p).mul_(pair.q)
        return weighted.sum(-1), weighted

    return formula


@divergence()
def jensen_shannon_divergence(beta: float = 0.5) -> Formula:
    """β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·p + (1−β)·q, between 0 and the entropy H(β).

    Source: Lin (1991), "Divergence Measures Based on the Shannon Entropy"; Agarwal et al. (2024),
    "On-Policy Distillation of Language Models".

    Raises:
        ValueError: unless 0 < ``beta`` < 1.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta must lie strictly between 0 and 1, got {beta!r}; at the ends the divergence "
            "is 0 everywhere: use KL or reverse KL for its limits"
        )

    def formula(pair):
        log_m = _mixture(pair.p, pair.q, beta).log_()
        student_part = (pair.log_q - log_m).mul_(pair.q).mul_(1 - beta)
        teacher_part = (pair.log_p - log_m).mul_(pair.p)
        return beta * teacher_part.sum(-1) + student_part.sum(-1), student_part

    return formula


@divergence()
def total_variation_distance() -> Formula:
    """½·Σ|p − q|, between 0 and 1; subgradient 0 where p = q.

    Source: Wen et al. (2023), "f-Divergence Minimization for Sequence-Level Knowledge
    Distillation".
    """

    def formula(pair):
        difference = pair.q - pair.p
        value = difference.abs().sum(-1) / 2
        return value, difference.sign_().mul_(pair.q).div_(2)

    return formula


@divergence()
def skew_kl_divergence(alpha: float = 0.1) -> Formula:
    """KL(p‖α·p + (1−α)·q), at most −log α.

    Source: Ko et al. (2024), "DistiLLM: Towards Streamlined Distillation for Large Language
    Models".

    Raises:
        ValueError: unless 0 ≤ ``alpha`` < 1.
    """
    _check_skew(alpha)
    if alpha == 0:
        return kl_divergence.formula()

    def formula(pair):
        p, q = pair.p, pair.q
        m = _mixture(p, q, alpha)
        # q·(1 − p/m)
        weighted = torch.addcmul(q, p / m, q, value=-1).mul_(1 - alpha)
        return (pair.log_p - m.log_()).mul_(p).sum(-1), weighted

    return formula


@divergence()
def skew_reverse_kl_divergence(alpha: float = 0.1) -> Formula:
    """KL(q‖α·q + (1−α)·p), at most −log α.

    Source: Ko et al. (2024), "DistiLLM: Towards Streamlined Distillation for Large Language
    Models".

    Raises:
        ValueError: unless 0 ≤ ``alpha`` < 1.
    """
    _check_skew(alpha)
    if alpha == 0:
        return reverse_kl_divergence.formula()

    def formula(pair):
        q = pair.q
        m = _mixture(q, pair.p, alpha)
        ratio = q / m
        log_ratio = pair.log_q - m.log_()
        return (q * log_ratio).sum(-1), q * (log_ratio - alpha * ratio)

    return formula


@divergence()
def adaptive_kl_divergence(head_mass: float = 0.5) -> Formula:
    """(g_h·KL(p‖q) + g_t·KL(q‖p)) / (g_h + g_t), weighted by where p and q differ.

    The head holds the teacher's heaviest tokens until their cumulative mass exceeds ``head_mass``
    (with the token that crosses it, so the first always); the tail holds the rest. g_h and g_t are
    Σ|p − q| over head and tail, constants for the gradient; ½ each where p = q.

    Source: Wu et al. (2025), "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
    Large Language Models".

    Raises:
        ValueError: unless 0 ≤ ``head_mass`` ≤ 1.
    """
    if not 0 <= head_mass <= 1:
        raise ValueError(f"head_mass must lie between 0 and 1, got {head_mass!r}")

    def formula(pair):
        p, q = pair.p, pair.q
        gap = (p - q).abs()
        head_gap = _sum_over_head(gap, p, head_mass)
        total_gap = gap.sum(-1, keepdim=True)
        head_weight = torch.where(total_gap > 0, head_gap / total_gap, 0.5).clamp(max=1)
        log_ratio = pair.log_q - pair.log_p
        reverse = q * log_ratio
        value = (1 - head_weight) * reverse - head_weight * p * log_ratio
        return value.sum(-1), head_weight * (q - p) + (1 - head_weight) * reverse

    return formula


def _sum_over_head(values: Tensor, p: Tensor, mass: float, most: int = _HEAD) -> Tensor:
    """Sums ``(positions, 1)`` of values over the heaviest tokens until their mass exceeds ``mass``.

    Of tokens of one mass the first come first. A head is short where there is a teacher worth its
    name, so it is looked for among the ``most`` heaviest; only where it goes on, or where it ends
    among tokens of one mass, all are sorted.
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


@divergence()
def alpha_beta_divergence(alpha: float = 0.5, beta: float = 0.5) -> Formula:
    """−1/(αβ)·Σ[p^α·q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)], and its continuous limits.

    (1, 0) is KL(p‖q), (0, 1) is KL(q‖p), (½, ½) four times the squared Hellinger distance,
    (1, 1) half the squared Euclidean distance. With a negative exponent the divergence is not
    bounded at small probabilities and may overflow, which raises.

    Source: Cichocki, Cruces and Amari (2011), "Generalized Alpha-Beta Divergences and Their
    Application to Robust Nonnegative Matrix Factorization"; Wang et al. (2025), "ABKD".

    Raises:
        ValueError: if ``alpha`` or ``beta`` is not finite.
    """
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise ValueError(f"alpha and beta must be finite, got {alpha!r} and {beta!r}")
    # So near a limit the general formula loses all digits to cancellation.
    zero_alpha, zero_beta, zero_sum = (abs(x) < 1e-6 for x in (alpha, beta, alpha + beta))

    def value(log_q, log_p):
        log_ratio = log_p - log_q
        if zero_alpha and zero_beta:
            return log_ratio.square().sum(-1) / 2
        if zero_beta:
            p, q = (alpha * log_p).exp(), (alpha * log_q).exp()
            return (p * alpha * log_ratio - p + q).sum(-1) / alpha**2
        if zero_alpha:
            p, q = (beta * log_p).exp(), (beta * log_q).exp()
            return (p - q - q * beta * log_ratio).sum(-1) / beta**2
        if zero_sum:
            return ((alpha * log_ratio).exp() - 1 - alpha * log_ratio).sum(-1) / alpha**2
        total = alpha + beta
        mixed = (alpha * log_p + beta * log_q).exp()
        p, q = (total * log_p).exp(), (total * log_q).exp()
        return (alpha / total * p + beta / total * q - mixed).sum(-1) / (alpha * beta)

    def weighted_gradient(log_q, log_p):
        if zero_alpha:
            return (beta * log_q).exp() * (log_q - log_p)
        power_q = ((alpha + beta) * log_q).exp()
        return (power_q - (alpha * log_p + beta * log_q).exp()) / alpha

    def formula(pair):
        log_q, log_p = pair.log_q.double(), pair.log_p.double()
        return value(log_q, log_p), weighted_gradient(log_q, log_p)

    return formula


@divergence(same_vocabulary=False)
def universal_logit_distance() -> Formula:
    """Σ|p₍ᵣ₎ − q₍ᵣ₎| over ranks r, each distribution sorted by itself; needs no common vocabulary.

    The smaller vocabulary is padded with probability 0. It is the 1-Wasserstein distance between
    the two *sets* of probabilities: which token has which probability does not matter.

    Source: Boizard et al. (2024), "Towards Cross-Tokenizer Distillation: the Universal Logit
    Distillation Loss for LLMs".
    """

    def formula(pair):
        q, order = pair.q.sort(-1, descending=True)
        p = pair.p.sort(-1, descending=True).values
        longer = max(q.shape[-1], p.shape[-1])
        difference = pad(q, (0, longer - q.shape[-1])) - pad(p, (0, longer - p.shape[-1]))
        sign = difference[..., : q.shape[-1]].sign()
        return difference.abs().sum(-1), torch.zeros_like(q).scatter_(-1, order, q * sign)

    return formula


def _check_skew(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and below 1, got {alpha!r}")


def _mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """w·a + (1−w)·b, above 0 so that it has a logarithm where neither has mass."""
    return torch.lerp(b, a, weight).clamp_(min=torch.finfo(a.dtype).tiny)
