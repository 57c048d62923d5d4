"""The objective of SinKD: KL, hard labels and optimal transport between the samples of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from otkd.functional.batch_transport import point_distances
from otkd.losses.base import Batch, DistillationLoss
from otkd.losses.batch import BatchSinkhornLoss
from otkd.losses.batch_base import SINKD_TEMPERATURE, BatchLoss, BatchSettings
from otkd.losses.divergences import CrossEntropyLoss, KLLoss
from otkd.losses.registry import register_loss
from otkd.losses.settings import as_pair
from otkd.losses.weighted import WeightedLoss
from otkd.precision import compute_dtype, without_autocast
from otkd.scalars import as_number, as_positive, as_whole


class SoftCrossEntropyLoss(KLLoss):
    """−Σ p·log q, which is KL(p‖q) plus the teacher's entropy and has the same gradient.

    See :class:`~otkd.losses.base.DistillationLoss` for the arguments.
    """

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        return super().per_position(batch) + self._teacher_entropy(batch)

    def _teacher_entropy(self, batch: Batch) -> Tensor:
        dtype = compute_dtype(batch.student_logits)
        if batch.stored is not None:
            log_p = batch.stored.log_atoms().to(dtype)
        else:
            temperature = self.teacher_temperature or self.temperature
            log_p = (batch.teacher_logits.to(dtype) / temperature).log_softmax(-1)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
        return entropy if batch.counted is None else entropy.masked_fill(~batch.counted, 0)


class UnrolledBatchSinkhornLoss(BatchLoss):
    """The batch transport of SinKD's public code, with the same numbers.

    K = exp(−W/ε), where W are the L1 distances. In each iteration the rows of P, then its columns,
    are divided by their sums, so that the plan has mass b instead of 1. The value is
    ``factor``·⟨P, W⟩, and autograd differentiates through every iteration. Use this class to
    reproduce published results, and :class:`BatchSinkhornLoss` otherwise.

    Args:
        temperature: divides the logits of both sides.
        epsilon: strength of the entropic regularisation.
        iterations: number of iterations; there is no early stop.
        factor: multiplies the value.
        **common: see :class:`BatchLoss`.
    """

    def __init__(
        self,
        *,
        temperature: float = SINKD_TEMPERATURE,
        epsilon: float = 0.1,
        iterations: int = 20,
        factor: float = 0.001,
        **common: Unpack[BatchSettings],
    ) -> None:
        super().__init__(temperature=temperature, **common)
        self.epsilon = as_positive("epsilon", epsilon)
        self.iterations = as_whole("iterations", iterations)
        self.factor = as_positive("factor", factor)

    def transport(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`BatchLoss`."""
        with without_autocast(student):
            distances = point_distances(student, teacher, "l1")
            plan = (distances / -self.epsilon).exp()
            for _ in range(self.iterations):
                plan = plan / plan.sum(-1, keepdim=True)
                plan = plan / plan.sum(-2, keepdim=True)
            shares = len(student) * self.factor * (plan * distances).sum(-1)
        return shares.mean(), shares


@register_loss("sinkd")
class SinKDLoss(WeightedLoss):
    """α·KL + (1−α)·CE + weight·batch Sinkhorn, the objective of SinKD with debiased transport.

    The batch transport is debiased, so it is 0 where student and teacher agree, and its default
    weight is 0.1. The published weight, 0.8, belongs to the public code, whose transport term is
    smaller: for 32 samples of three classes, the gradient of ``BatchSinkhornLoss(debias=False)``
    was 27 times that of :meth:`author`'s.

    Args:
        alpha: weight of the KL term; the weight of the hard labels is 1 − α.
        sinkhorn_weight: weight of the batch transport.
        temperature: of the KL term; 1 by default.
        teacher_temperature: of the KL term.
        rescale_t2: multiply the KL term by the square of its temperature.
        reduction: of every term. ``soft_loss`` and ``transport`` must have the same.
        vocab_size: number of real classes if the logits are padded. ``soft_loss`` and
            ``transport`` must have the same, unless they compare features.
        soft_loss: replaces the KL term. It has its own temperatures and rescaling, so the three
            arguments above must not be given with it.
        transport: replaces ``BatchSinkhornLoss()``.

    Raises:
        TypeError: for settings that are not numbers.
        ValueError: unless 0 ≤ ``alpha`` ≤ 1, and for settings that are out of range or contradict
            a loss that is given.

    Source: Cui et al. (2024), "SinKD: Sinkhorn Distance Minimization for Knowledge Distillation".

    Example:
        >>> student = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> teacher = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
        >>> loss = otkd.SinKDLoss()
        >>> loss(student, teacher, labels=torch.tensor([0, 1, 0]))
        tensor(0.1878)
        >>> {name: round(value.item(), 4) for name, value in loss.last_terms.items()}
        {'kl': 0.1471, 'ce': 0.3157, 'sinkhorn': 0.2385}
    """

    def __init__(
        self,
        alpha: float = 0.9,
        sinkhorn_weight: float = 0.1,
        *,
        temperature: float | None = None,
        teacher_temperature: float | None = None,
        rescale_t2: bool | None = None,
        reduction: str = "mean",
        vocab_size: int | None = None,
        soft_loss: nn.Module | None = None,
        transport: nn.Module | None = None,
    ) -> None:
        alpha = as_number("alpha", alpha)
        sinkhorn_weight = as_number("sinkhorn_weight", sinkhorn_weight)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
        common: dict[str, Any] = {"reduction": reduction, "vocab_size": vocab_size}
        of_the_kl_term = {
            "temperature": temperature,
            "teacher_temperature": teacher_temperature,
            "rescale_t2": rescale_t2,
        }
        given = {name: value for name, value in of_the_kl_term.items() if value is not None}
        if soft_loss is None:
            soft_loss = KLLoss(**given, **common)
        elif given:
            raise ValueError(
                f"{next(iter(given))}= is a setting of the KL term, which soft_loss= replaces: "
                f"pass it to the {type(soft_loss).__name__}"
            )
        if transport is None:
            transport = BatchSinkhornLoss(**common)
        for name, loss in (("soft_loss", soft_loss), ("transport", transport)):
            _check_vocab_size(name, loss, vocab_size)
        super().__init__(
            {
                "kl": (alpha, soft_loss),
                "ce": (1 - alpha, CrossEntropyLoss(**common)),
                "sinkhorn": (sinkhorn_weight, transport),
            }
        )

    @classmethod
    def author(
        cls,
        alpha: float = 0.9,
        sinkhorn_weight: float = 0.8,
        *,
        temperature: float = 1.0,
        reduction: str = "mean",
    ) -> SinKDLoss:
        """The arithmetic of SinKD's public code, for reproducing its results.

        Soft cross-entropy without T² replaces KL. The transport has mass b, is multiplied by 0.001,
        and uses 20 unrolled iterations at ε = 0.1 and temperature 2.
        """
        return cls(
            alpha,
            sinkhorn_weight,
            reduction=reduction,
            soft_loss=SoftCrossEntropyLoss(
                temperature=temperature, rescale_t2=False, reduction=reduction
            ),
            transport=UnrolledBatchSinkhornLoss(reduction=reduction),
        )


def _check_vocab_size(name: str, loss: nn.Module, vocab_size: int | None) -> None:
    """Raise ``ValueError`` if a term reads other logits of the student than the hard labels do."""
    if not isinstance(loss, DistillationLoss) or loss.needs_features:
        return
    own = loss.vocab_size
    sizes = [None if size is None else as_pair(size)[0] for size in (own, vocab_size)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name} has vocab_size={own} but SinKDLoss has vocab_size={vocab_size}: use the same "
            "for both"
        )
