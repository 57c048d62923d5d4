"""Exact transport between the student's and the teacher's token distributions."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from otkd.costs import Cost
from otkd.functional.wasserstein import wasserstein_distance
from otkd.losses.base import Batch, DistillationLoss
from otkd.losses.ground_cost import make_cost
from otkd.losses.registry import register_loss
from otkd.losses.settings import CommonSettings
from otkd.scalars import as_positive


@register_loss("wasserstein")
class WassersteinLoss(DistillationLoss):
    """Exact optimal transport between q and p over the tokens: min_P ⟨P, C^p⟩, without a root.

    A closed form is used for the 0/1 cost, for |i − j|^r with r·p ≥ 1, and for two tokens.
    Otherwise a linear program is solved for each position, up to 1024 tokens. The gradient is
    computed from the dual potentials. The logit gradient falls as 1/T, so the loss is not
    multiplied by T² by default.

    Args:
        cost: as for :class:`SinkhornLoss`, except ``"embedding"``: pass an ``EmbeddingCost``.
        p: power of the cost, above 0.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.

    Raises:
        TypeError, ValueError: for settings that are out of range, or an unusable cost.

    Source: Peyré and Cuturi (2019), "Computational Optimal Transport".

    Example:
        >>> ratings = otkd.WassersteinLoss(cost="ordinal")  # one to three stars
        >>> teacher = torch.tensor([[9.0, 0.0, 0.0]])
        >>> ratings(torch.tensor([[0.0, 9.0, 0.0]]), teacher)
        tensor(0.9996)
        >>> ratings(torch.tensor([[0.0, 0.0, 9.0]]), teacher)
        tensor(1.9993)
    """

    rescales_by_default = False

    def __init__(
        self, cost: str | Tensor | Cost, *, p: float = 1.0, **common: Unpack[CommonSettings]
    ) -> None:
        super().__init__(**common)
        self.p = as_positive("p", p)
        if isinstance(cost, str) and cost == "embedding":
            raise ValueError("pass otkd.costs.EmbeddingCost(embedding) as the cost")
        self.cost = make_cost(cost)
        self.cost.power(self.p)

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether the cost is between two different vocabularies."""
        return self.cost.bridges_vocabularies

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        return wasserstein_distance(
            batch.student_logits,
            batch.teacher_logits,
            cost=self.cost,
            p=self.p,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            mask=batch.counted,
        )

    def extra_repr(self) -> str:
        """The power and the common settings."""
        return f"p={self.p}, {super().extra_repr()}"
