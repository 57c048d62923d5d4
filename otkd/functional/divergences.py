"""Divergences between next-token distributions, p of the teacher and q of the student.

Each is a function ``f(student_logits, teacher_logits, *, temperature=1.0, …)`` that returns one
value per position, ``(*batch,)``, in nats (TVD, ULD and Hellinger without a unit). Common
arguments:

    student_logits: ``(*batch, vocab)``, any floating dtype. Computations use float32, or float64
        for float64 logits.
    teacher_logits: ``(*batch, vocab)``; no gradient flows to it.
    temperature: divides the logits of both sides before the softmax.
    teacher_temperature: if given, divides the teacher's logits instead.
    mask: ``(*batch,)``; where it is zero, the value is 0 and the logits may hold any value.

All raise ``TypeError`` or ``ValueError`` for logits of different shapes, for parameters out of
range and for NaN in a counted position. Log-probabilities are clamped at ``rowwise.LOG_ZERO``
(−10⁵), so that an infinite divergence becomes large and finite, with the analytic gradient.

The formulas are in :mod:`otkd.functional.formulas`, and their common part is in
:mod:`otkd.functional.rowwise`.
"""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor

from otkd.functional import formulas
from otkd.functional.rowwise import rowwise_divergence


def kl_divergence(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """KL(p‖q) = Σ p·log(p/q), with gradient (q − p)/T in the student's logits.

    Source: Hinton, Vinyals and Dean (2015), "Distilling the Knowledge in a Neural Network".
    """
    return rowwise_divergence(
        formulas.KL(),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )


def reverse_kl_divergence(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """KL(q‖p) = Σ q·log(q/p); mode-seeking.

    Source: Gu et al. (2024), "MiniLLM: Knowledge Distillation of Large Language Models".
    """
    return rowwise_divergence(
        formulas.ReverseKL(),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )


def jensen_shannon_divergence(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
    beta: float = 0.5,
) -> Float[Tensor, "*batch"]:
    """β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·p + (1−β)·q, between 0 and the entropy H(β).

    Source: Lin (1991), "Divergence Measures Based on the Shannon Entropy"; Agarwal et al. (2024),
    "On-Policy Distillation of Language Models".

    Raises:
        ValueError: unless 0 < ``beta`` < 1.
    """
    return rowwise_divergence(
        formulas.JensenShannon(beta=beta),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )


def total_variation_distance(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """½·Σ|p − q|, between 0 and 1; subgradient 0 where p = q.

    Source: Wen et al. (2023), "f-Divergence Minimization for Sequence-Level Knowledge
    Distillation".
    """
    return rowwise_divergence(
        formulas.TotalVariation(),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )


def hellinger_divergence(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Σ(√q − √p)² = 2 − 2·Σ√(qp), the squared Hellinger distance; symmetric, between 0 and 2.

    Many authors halve it. Its derivative in q is infinite where q = 0 < p, but q·∂D/∂q = q − √(qp),
    and with it the gradient in the logits, tends to 0 with q.

    Source: Sason and Verdú (2016), "f-Divergence Inequalities".
    """
    return rowwise_divergence(
        formulas.Hellinger(),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )


def skew_kl_divergence(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
    alpha: float = 0.1,
) -> Float[Tensor, "*batch"]:
    """KL(p‖α·p + (1−α)·q), at most −log α.

    Source: Ko et al. (2024), "DistiLLM: Towards Streamlined Distillation for Large Language
    Models".

    Raises:
        ValueError: unless 0 ≤ ``alpha`` < 1.
    """
    return rowwise_divergence(
        formulas.SkewKL(alpha=alpha),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )


def skew_reverse_kl_divergence(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
    alpha: float = 0.1,
) -> Float[Tensor, "*batch"]:
    """KL(q‖α·q + (1−α)·p), at most −log α.

    Source: Ko et al. (2024), "DistiLLM: Towards Streamlined Distillation for Large Language
    Models".

    Raises:
        ValueError: unless 0 ≤ ``alpha`` < 1.
    """
    return rowwise_divergence(
        formulas.SkewReverseKL(alpha=alpha),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )


def adaptive_kl_divergence(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
    head_mass: float = 0.5,
) -> Float[Tensor, "*batch"]:
    """(g_h·KL(p‖q) + g_t·KL(q‖p)) / (g_h + g_t), weighted by where p and q differ.

    The head consists of the teacher's most probable tokens up to and including the one with which
    their total probability exceeds ``head_mass``; the tail consists of all others. g_h and g_t are
    Σ|p − q| over head and tail, constants for the gradient. At p = q both weights are ½.

    Source: Wu et al. (2025), "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
    Large Language Models".

    Raises:
        ValueError: unless 0 ≤ ``head_mass`` ≤ 1.
    """
    return rowwise_divergence(
        formulas.AdaptiveKL(head_mass=head_mass),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )


def alpha_beta_divergence(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
    alpha: float = 0.5,
    beta: float = 0.5,
) -> Float[Tensor, "*batch"]:
    """−1/(αβ)·Σ[p^α·q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)], and its continuous limits.

    (1, 0) is KL(p‖q), (0, 1) is KL(q‖p), (½, ½) is twice :func:`hellinger_divergence`, and
    (1, 1) is half the squared Euclidean distance. With a negative exponent the divergence is
    unbounded at small probabilities; if it overflows, an error is raised.

    Source: Cichocki, Cruces and Amari (2011), "Generalized Alpha-Beta Divergences and Their
    Application to Robust Nonnegative Matrix Factorization"; Wang et al. (2025), "ABKD".

    Raises:
        ValueError: if ``alpha`` or ``beta`` is not finite.
    """
    return rowwise_divergence(
        formulas.AlphaBeta(alpha=alpha, beta=beta),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )


def universal_logit_distance(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch teacher_vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Σ|p₍ᵣ₎ − q₍ᵣ₎| over ranks r, where p and q are each sorted; works between two vocabularies.

    The smaller vocabulary is padded with probability 0. The result is the 1-Wasserstein distance
    between the two *sets* of probabilities; it ignores which token has which probability.

    Source: Boizard et al. (2024), "Towards Cross-Tokenizer Distillation: the Universal Logit
    Distillation Loss for LLMs".
    """
    return rowwise_divergence(
        formulas.UniversalLogit(),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )
