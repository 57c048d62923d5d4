"""Likelihoods of spans of several tokens between two common positions."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from otkd.alignment.positions import AlignedPositions
from otkd.checks import check_positive

_LEAST = -1e5  # a log-likelihood of a token without mass, as in all divergences


def span_likelihood_divergence(
    student_log_likelihoods: Float[Tensor, " student_tokens"],
    teacher_log_likelihoods: Float[Tensor, " teacher_tokens"],
    positions: AlignedPositions,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " spans"]:
    """The divergence between the probabilities that both models give to the same bytes.

    Between two common positions both models write the same bytes, in one or several tokens. With P
    and Q the products of the probabilities of the teacher's and the student's tokens there, raised
    to 1/``temperature``, the value is the Kullback–Leibler divergence of two outcomes, to write
    these bytes or not:

        P log(P/Q) + (1 − P) log((1 − P)/(1 − Q))

    It compares the text that is there, not the whole distribution, so it complements a loss at the
    positions. The first position starts the first span; nothing before it counts.

    Args:
        student_log_likelihoods: of each token of the text given those before it, for example
            ``logits[:-1].log_softmax(-1)`` at the tokens that follow, with any number in front for
            the first token.
        teacher_log_likelihoods: likewise; a constant.
        positions: of the same text, from :func:`~otkd.alignment.align_positions`.
        temperature: above 1, likely and unlikely spans are compared more evenly.

    Returns:
        One value for each pair of neighbouring positions, in their order.

    Raises:
        ValueError: if a position is beyond the tokens, or ``temperature`` is not above 0.

    Source: Minixhofer et al. (2025), "Universal Cross-Tokenizer Distillation via Approximate
    Likelihood Matching".

    Example:
        >>> found = otkd.alignment.common_positions([0, 2, 3], [0, 1, 2, 3])
        >>> student, teacher = torch.tensor([0.0, 0.25, 0.5]), torch.tensor([0.0, 0.5, 0.5, 0.5])
        >>> otkd.alignment.span_likelihood_divergence(student.log(), teacher.log(), found)
        tensor([0., 0.])
    """
    check_positive(temperature=temperature)
    q = _span_sums("student", student_log_likelihoods, positions.student)
    p = _span_sums("teacher", teacher_log_likelihoods.detach(), positions.teacher)
    p = p.to(q)
    log_q, log_p = (x.clamp(min=_LEAST) / temperature for x in (q, p))
    mass = log_p.exp()
    return mass * (log_p - log_q) + (1 - mass) * (_log_of_rest(log_p) - _log_of_rest(log_q))


def _span_sums(side: str, values: Tensor, ends: Tensor) -> Tensor:
    """The sums of the tokens after each position, up to the next one."""
    if not len(ends):
        return values.new_zeros(0)
    ends = ends.to(values.device)
    if int(ends[-1]) >= len(values):
        raise ValueError(
            f"the {side} has a position at token {int(ends[-1])}, but only {len(values)} "
            "log-likelihoods"
        )
    tokens = torch.arange(int(ends[0]) + 1, int(ends[-1]) + 1, device=values.device)
    span = torch.searchsorted(ends[1:].contiguous(), tokens)
    dtype = torch.promote_types(values.dtype, torch.float32)
    sums = values.new_zeros(len(ends) - 1, dtype=dtype)
    return sums.index_add(0, span, values[tokens].to(dtype))


def _log_of_rest(log_mass: Tensor) -> Tensor:
    """log(1 − exp(x)) for x ≤ 0, accurate at both ends, and finite at 0."""
    x = log_mass.clamp(max=-torch.finfo(log_mass.dtype).eps)
    is_large = x > -math.log(2)
    near_zero = x.where(is_large, torch.full_like(x, -1.0))
    far = x.where(~is_large, torch.full_like(x, -1.0))
    return torch.where(is_large, (-torch.expm1(near_zero)).log(), torch.log1p(-far.exp()))
