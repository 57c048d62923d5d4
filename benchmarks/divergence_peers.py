"""The divergences as computed by otkd and others: see :mod:`peers`."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch.nn.functional as F
from problems import Function, Problem
from torch import Tensor

import otkd


def _otkd(problem: Problem, *, loss: str) -> Function:
    return getattr(otkd, loss)(reduction="none")


def _kl_div(problem: Problem) -> Function:
    def function(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)

    return function


def _plain(problem: Problem, *, divergence: str) -> Function:
    """The formula as it is usually written, with autograd."""

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        if divergence in _OF_PROBABILITIES:
            return _OF_PROBABILITIES[divergence](student.softmax(-1), teacher.softmax(-1))
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        return _OF_LOGARITHMS[divergence](log_q.exp(), log_p.exp(), log_q, log_p)

    return function


def _middle_kl(q: Tensor, p: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = ((q + p) / 2).log()
    return ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2


def _skewed(a: Tensor, b: Tensor, log_a: Tensor) -> Tensor:
    return (a * (log_a - (0.1 * a + 0.9 * b).log())).sum(-1)


def _adaptive_kl(q: Tensor, p: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    sorted_p, order = p.sort(-1, descending=True)
    gap = (sorted_p - q.detach().gather(-1, order)).abs()
    in_head = sorted_p.cumsum(-1) - sorted_p <= 0.5
    head = (gap * in_head).sum(-1) / gap.sum(-1)
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    return head * forward + (1 - head) * reverse


_OF_LOGARITHMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "KLLoss": lambda q, p, log_q, log_p: (p * (log_p - log_q)).sum(-1),
    "ReverseKLLoss": lambda q, p, log_q, log_p: (q * (log_q - log_p)).sum(-1),
    "JSDLoss": _middle_kl,
    "SkewKLLoss": lambda q, p, log_q, log_p: _skewed(p, q, log_p),
    "SkewReverseKLLoss": lambda q, p, log_q, log_p: _skewed(q, p, log_q),
    "AdaptiveKLLoss": _adaptive_kl,
}
_OF_PROBABILITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "TVDLoss": lambda q, p: (q - p).abs().sum(-1) / 2,
    "HellingerLoss": lambda q, p: (q.sqrt() - p.sqrt()).square().sum(-1),
    # α = β = ½.
    "AlphaBetaLoss": lambda q, p: 4 * ((p + q) / 2 - p.sqrt() * q.sqrt()).sum(-1),
    "UniversalLogitLoss": lambda q, p: (
        (q.sort(-1, descending=True).values - p.sort(-1, descending=True).values).abs().sum(-1)
    ),
}
PLAIN = (*_OF_LOGARITHMS, *_OF_PROBABILITIES)


def _trl_jsd(problem: Problem) -> Function:
    """TRL's generalized JSD at β = ½, which returns one term per token."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.gkd import GKDTrainer

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(
            student, teacher, beta=0.5, temperature=1.0, reduction="none"
        ).sum(-1)

    return function


def _torchdistill(problem: Problem) -> Function:
    from torchdistill.losses.mid_level import KDLoss

    loss = KDLoss(
        "logits", "output", "logits", "output", temperature=1.0, alpha=0.0, reduction="none"
    )

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        student_io, teacher_io = ({"logits": {"output": z}} for z in (student, teacher))
        return loss(student_io, teacher_io).sum(-1)

    return function


def _liger(problem: Problem, *, divergence: str) -> Function:
    """Liger's kernels on log-probabilities from torch; they return no value per position."""
    from liger_kernel.transformers import jsd, kl_div, tvd

    if divergence == "JSDLoss":
        loss = jsd.LigerJSD(beta=0.5)
    elif divergence == "KLLoss":
        loss = kl_div.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        loss = tvd.LigerTVDLoss(reduction="batchmean")

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        if divergence == "TVDLoss":
            value = loss(student.softmax(-1), teacher.softmax(-1))
        else:
            value = loss(student.log_softmax(-1), teacher.log_softmax(-1))
        return value * len(student)

    return function


DIVERGENCES: dict[str, Callable[..., Function]] = {
    "otkd": _otkd,
    "plain": _plain,
    "kl_div": _kl_div,
    "trl_jsd": _trl_jsd,
    "torchdistill": _torchdistill,
    "liger": _liger,
}
