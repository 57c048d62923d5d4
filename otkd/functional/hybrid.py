"""Universal logit distillation that compares tokens of both vocabularies by KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from otkd.functional.rowwise import Formula, Pair


@dataclass(frozen=True, kw_only=True, eq=False)
class HybridUniversalLogit(Formula):
    """w·Σ_matched (p log p/q − p + q) + (1 − w)·Σ|sorted p − sorted q| over the other tokens.

    The first sum is the Kullback–Leibler divergence of masses that need not add up to 1: it is at
    least 0, and 0 only if the masses are equal.

    Attributes:
        student: the student's tokens that are matched.
        teacher: the teacher's token for each.
        student_rest: all other tokens of the student.
        teacher_rest: all other tokens of the teacher.
        weight: w.
    """

    same_vocabulary: ClassVar[bool] = False

    student: Tensor
    teacher: Tensor
    student_rest: Tensor
    teacher_rest: Tensor
    weight: float

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See :class:`~otkd.functional.rowwise.Formula`."""
        q, p = pair.q[:, self.student], pair.p[:, self.teacher]
        logs = pair.log_p[:, self.teacher] - pair.log_q[:, self.student]
        matched = (p * logs - p + q).sum(-1)
        rest, order = pair.q[:, self.student_rest].sort(-1, descending=True)
        others = pair.p[:, self.teacher_rest].sort(-1, descending=True).values
        longer = max(rest.shape[-1], others.shape[-1])
        difference = pad(rest, (0, longer - rest.shape[-1])) - pad(
            others, (0, longer - others.shape[-1])
        )
        slopes = (rest * difference[:, : rest.shape[-1]].sign()).mul_(1 - self.weight)
        weighted = torch.zeros_like(pair.q)
        weighted[:, self.student] = self.weight * (q - p)
        weighted[:, self.student_rest] = torch.zeros_like(rest).scatter_(-1, order, slopes)
        values = self.weight * matched + (1 - self.weight) * difference.abs().sum(-1)
        return values, weighted
