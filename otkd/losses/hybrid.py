"""ULD that compares tokens of both vocabularies by KL, as GOLD does."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from otkd.alignment import TokenMap
from otkd.functional.hybrid import HybridUniversalLogit
from otkd.functional.rowwise import rowwise_divergence
from otkd.losses.base import Batch
from otkd.losses.mapped_loss import MappedLoss
from otkd.losses.settings import CommonSettings
from otkd.scalars import as_number


class HybridLogitLoss(MappedLoss):
    """KL between tokens that both vocabularies have, and ULD between all others (GOLD).

        w·Σ_matched (p log p/q − p + q) + (1 − w)·Σ|sorted p − sorted q|

    The matched tokens are ``token_map.exact``: the same bytes, or the same role. The sum over them
    is the Kullback–Leibler divergence of masses that need not add up to 1. GOLD compares them by a
    Jensen–Shannon divergence instead; with all tokens matched, this loss is :class:`~otkd.KLLoss`.

    A stored top-k teacher is expanded, with the mass of its tail spread evenly.

    Args:
        token_map: from :func:`otkd.alignment.token_map`.
        matched_weight: w, from 0 to 1; by default the share of the teacher's tokens that are
            matched, as in GOLD.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.

    Raises:
        TypeError, ValueError: for another kind of map, or a weight out of range; in a call, if the
            logits do not have the sizes of the map.

    Source: Patiño et al. (2025), "Unlocking On-Policy Distillation for Any Model Family"; Boizard
    et al. (2024), "Towards Cross-Tokenizer Distillation", for ULD.

    Example:
        >>> found = otkd.alignment.TokenMap.of_pairs([0], [2], vocab_size=(2, 3))
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0, 1.0]])
        >>> otkd.HybridLogitLoss(found, matched_weight=0.5)(student, teacher)
        tensor(0.5109)
    """

    def __init__(
        self,
        token_map: TokenMap,
        *,
        matched_weight: float | None = None,
        **common: Unpack[CommonSettings],
    ) -> None:
        super().__init__(token_map, **common)
        student, teacher = token_map.exact
        if matched_weight is None:
            matched_weight = len(teacher) / token_map.vocab_size[1]
        weight = float(as_number("matched_weight", matched_weight))
        if not 0 <= weight <= 1:
            raise ValueError(f"matched_weight must lie from 0 to 1, got {matched_weight!r}")
        self.matched_weight = weight
        rest = [
            _all_but(ids, size)
            for ids, size in zip((student, teacher), token_map.vocab_size, strict=True)
        ]
        self._formula = HybridUniversalLogit(
            student=student,
            teacher=teacher,
            student_rest=rest[0],
            teacher_rest=rest[1],
            weight=weight,
        )

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        self.map_for(batch)
        device, formula = batch.student_logits.device, self._formula
        if formula.student.device != device:
            formula = self._formula = HybridUniversalLogit(
                student=formula.student.to(device),
                teacher=formula.teacher.to(device),
                student_rest=formula.student_rest.to(device),
                teacher_rest=formula.teacher_rest.to(device),
                weight=formula.weight,
            )
        return rowwise_divergence(
            formula,
            batch.student_logits,
            batch.teacher_logits,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            mask=batch.counted,
        )

    def extra_repr(self) -> str:
        """The weight and the common settings."""
        return f"matched_weight={self.matched_weight:.4g}, {super().extra_repr()}"


def _all_but(ids: Tensor, size: int) -> Tensor:
    others = torch.ones(size, dtype=torch.bool, device=ids.device)
    others[ids] = False
    return others.nonzero().squeeze(-1)
