"""Losses that compare the teacher's distribution p with the student's q by a divergence."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import Unpack

from otkd.checks import as_class_labels, check_class_labels, check_finite_rows
from otkd.functional import formulas
from otkd.functional.rowwise import Formula, rowwise_divergence
from otkd.functional.stored_rowwise import stored_divergence
from otkd.losses.base import Batch, DistillationLoss
from otkd.losses.registry import register_loss
from otkd.losses.settings import CommonSettings
from otkd.precision import compute_dtype
from otkd.reductions import IGNORE_INDEX


class DivergenceLoss(DistillationLoss):
    """Base of the losses that are a divergence per position, such as :class:`KLLoss`.

    With a stored top-k teacher, both sides are compared over k + 1 atoms: the stored tokens, and
    one atom for all other tokens. See :mod:`otkd.functional.stored_rowwise`.

    Args:
        formula: the divergence with its parameters; see :mod:`otkd.functional.formulas`.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.
    """

    reads_stored = True

    def __init__(self, formula: Formula, **common: Unpack[CommonSettings]) -> None:
        super().__init__(**common)
        self.formula = formula

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        if batch.stored is not None:
            return stored_divergence(
                self.formula,
                batch.student_logits,
                batch.stored,
                temperature=self.temperature,
                mask=batch.counted,
            )
        return rowwise_divergence(
            self.formula,
            batch.student_logits,
            batch.teacher_logits,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            mask=batch.counted,
        )

    def extra_repr(self) -> str:
        """The parameters of the divergence and the common settings."""
        parameters = "".join(f"{name}={value}, " for name, value in asdict(self.formula).items())
        return parameters + super().extra_repr()


@register_loss("kl")
class KLLoss(DivergenceLoss):
    """KL(p‖q), the standard distillation loss; mass-covering.

    See :func:`otkd.functional.kl_divergence` for the formula and
    :class:`~otkd.losses.base.DistillationLoss` for the arguments.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> otkd.KLLoss(temperature=2)(student, teacher)
        tensor(0.1237)
    """

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.KL(), **common)


@register_loss("rkl")
class ReverseKLLoss(DivergenceLoss):
    """KL(q‖p), reverse KL; mode-seeking.

    See :func:`otkd.functional.reverse_kl_divergence` for the formula and
    :class:`~otkd.losses.base.DistillationLoss` for the arguments.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> otkd.ReverseKLLoss()(student, teacher)
        tensor(0.1109)
    """

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.ReverseKL(), **common)


@register_loss("jsd")
class JSDLoss(DivergenceLoss):
    """β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·p + (1−β)·q: generalised Jensen-Shannon; bounded.

    See :func:`otkd.functional.jensen_shannon_divergence` for the formula and
    :class:`~otkd.losses.base.DistillationLoss` for the other arguments.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> otkd.JSDLoss(beta=0.1)(student, teacher)
        tensor(0.0107)
    """

    def __init__(self, beta: float = 0.5, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.JensenShannon(beta=beta), **common)


@register_loss("tvd")
class TVDLoss(DivergenceLoss):
    """½·Σ|p − q|, total variation distance.

    Its logit gradient falls as 1/T, so it is not multiplied by T² by default. See
    :func:`otkd.functional.total_variation_distance` for the formula and
    :class:`~otkd.losses.base.DistillationLoss` for the arguments.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> otkd.TVDLoss()(student, teacher)
        tensor(0.2311)
    """

    rescales_by_default = False

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.TotalVariation(), **common)


@register_loss("hellinger")
class HellingerLoss(DivergenceLoss):
    """Σ(√q − √p)², squared Hellinger distance; symmetric and bounded.

    See :func:`otkd.functional.hellinger_divergence` for the formula and
    :class:`~otkd.losses.base.DistillationLoss` for the arguments.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> otkd.HellingerLoss()(student, teacher)
        tensor(0.0574)
    """

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.Hellinger(), **common)


@register_loss("skl")
class SkewKLLoss(DivergenceLoss):
    """KL(p‖α·p + (1−α)·q), the skew KL of DistiLLM; bounded.

    See :func:`otkd.functional.skew_kl_divergence` for the formula and
    :class:`~otkd.losses.base.DistillationLoss` for the other arguments.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> otkd.SkewKLLoss(alpha=0.1)(student, teacher)
        tensor(0.0950)
    """

    def __init__(self, alpha: float = 0.1, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.SkewKL(alpha=alpha), **common)


@register_loss("srkl")
class SkewReverseKLLoss(DivergenceLoss):
    """KL(q‖α·q + (1−α)·p), the skew reverse KL of DistiLLM; bounded.

    See :func:`otkd.functional.skew_reverse_kl_divergence` for the formula and
    :class:`~otkd.losses.base.DistillationLoss` for the other arguments.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> otkd.SkewReverseKLLoss(alpha=0.1)(student, teacher)
        tensor(0.0906)
    """

    def __init__(self, alpha: float = 0.1, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.SkewReverseKL(alpha=alpha), **common)


@register_loss("akl")
class AdaptiveKLLoss(DivergenceLoss):
    """(g_h·KL + g_t·RKL)/(g_h + g_t): KL and reverse KL, weighted by the gaps in head and tail.

    With a stored top-k teacher, all tokens that are not stored belong to the tail. The loss is
    then non-negative, and 0 with zero gradient where the student has the stored masses, but its
    value is neither an upper nor a lower bound of the value over all tokens.

    See :func:`otkd.functional.adaptive_kl_divergence` for the formula and
    :class:`~otkd.losses.base.DistillationLoss` for the other arguments.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> otkd.AdaptiveKLLoss()(student, teacher)
        tensor(0.1201)
    """

    def __init__(self, head_mass: float = 0.5, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.AdaptiveKL(head_mass=head_mass), **common)


@register_loss("alpha_beta")
class AlphaBetaLoss(DivergenceLoss):
    """α-β-divergence: a family with KL at (1, 0) and reverse KL at (0, 1).

    With a stored top-k teacher, the loss is non-negative, and 0 with zero gradient where the
    student has the stored masses. Its value is a lower bound of the value over all tokens if
    α + β = 1, as for KL and every other f-divergence; otherwise it is no bound.

    See :func:`otkd.functional.alpha_beta_divergence` for the formula and
    :class:`~otkd.losses.base.DistillationLoss` for the other arguments.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> otkd.AlphaBetaLoss(alpha=0.5, beta=0.5)(student, teacher)
        tensor(0.1148)
    """

    def __init__(
        self, alpha: float = 0.5, beta: float = 0.5, **common: Unpack[CommonSettings]
    ) -> None:
        super().__init__(formulas.AlphaBeta(alpha=alpha, beta=beta), **common)


@register_loss("uld")
class UniversalLogitLoss(DivergenceLoss):
    """Σ|sorted p − sorted q|, universal logit distillation (ULD), between any two vocabularies.

    A stored top-k teacher must hold the k most probable tokens. They are compared with the
    student's k most probable tokens, and the remaining masses with each other; this is a lower
    bound of the value over all tokens.

    Its logit gradient falls as 1/T, so it is not multiplied by T² by default. See
    :func:`otkd.functional.universal_logit_distance` for the formula and
    :class:`~otkd.losses.base.DistillationLoss` for the arguments.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0, 1.0]])
        >>> otkd.UniversalLogitLoss()(student, teacher)
        tensor(0.3095)
    """

    rescales_by_default = False

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.UniversalLogit(), **common)

    @property
    def bridges_vocabularies(self) -> bool:
        """True, because ranks are compared instead of tokens."""
        return True


@register_loss("ce")
class CrossEntropyLoss(DistillationLoss):
    """−log q(label), the loss of hard labels; the teacher is not used.

    ``temperature`` divides the student's logits. ``teacher_temperature`` and the teacher's size in
    ``vocab_size`` are accepted and have no effect, so that the same options can be passed to every
    loss. See :class:`~otkd.losses.base.DistillationLoss` for the arguments.

    Example:
        >>> otkd.CrossEntropyLoss()(torch.tensor([[1.0, 0.0]]), labels=torch.tensor([0]))
        tensor(0.3133)
    """

    needs_teacher = False
    needs_labels = True
    rescales_by_default = False

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        super().__init__(**common)

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        logits = batch.student_logits
        vocab, batch_shape = logits.shape[-1], logits.shape[:-1]
        labels = as_class_labels(batch.labels).to(logits.device)
        if batch.counted is not None:
            labels = labels.masked_fill(~batch.counted, IGNORE_INDEX)
            logits = logits.masked_fill(~batch.counted.unsqueeze(-1), 0.0)
        check_class_labels(labels, vocab)
        scaled = logits.to(compute_dtype(logits)).reshape(-1, vocab) / self.temperature
        values = cross_entropy(
            scaled, labels.reshape(-1), reduction="none", ignore_index=IGNORE_INDEX
        )
        check_finite_rows(values.detach(), "a hard-label loss that is not finite")
        return values.reshape(batch_shape)
