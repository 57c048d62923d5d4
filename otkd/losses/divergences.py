"""Losses that are a divergence of the two distributions of each position."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import Unpack

from otkd.checks import as_class_labels, check_class_labels, check_finite_rows
from otkd.functional import formulas
from otkd.functional.rowwise import Formula, rowwise_divergence
from otkd.functional.stored_rowwise import stored_divergence
from otkd.losses.base import Batch, CommonSettings, DistillationLoss
from otkd.losses.registry import register_loss
from otkd.precision import compute_dtype
from otkd.reductions import IGNORE_INDEX


class DivergenceLoss(DistillationLoss):
    """A loss whose value at a position is a formula of :mod:`otkd.functional.formulas`.

    A stored top-k teacher is compared over k + 1 atoms, the stored tokens and all others as one:
    see :mod:`otkd.functional.stored_rowwise`.

    Args:
        formula: the divergence with its parameters.
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
    """KL(p‖q): the classical distillation loss; mass-covering.

    See :func:`otkd.functional.kl_divergence`; arguments as
    :class:`~otkd.losses.base.DistillationLoss`.
    """

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.KL(), **common)


@register_loss("rkl")
class ReverseKLLoss(DivergenceLoss):
    """KL(q‖p): reverse KL; mode-seeking.

    See :func:`otkd.functional.reverse_kl_divergence`; arguments as
    :class:`~otkd.losses.base.DistillationLoss`.
    """

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.ReverseKL(), **common)


@register_loss("jsd")
class JSDLoss(DivergenceLoss):
    """β·KL(p‖m) + (1−β)·KL(q‖m): generalised Jensen-Shannon divergence, bounded.

    See :func:`otkd.functional.jensen_shannon_divergence`; other arguments as
    :class:`~otkd.losses.base.DistillationLoss`.
    """

    def __init__(self, beta: float = 0.5, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.JensenShannon(beta=beta), **common)


@register_loss("tvd")
class TVDLoss(DivergenceLoss):
    """½·Σ|p − q|: total variation distance.

    See :func:`otkd.functional.total_variation_distance`; arguments as
    :class:`~otkd.losses.base.DistillationLoss`. Its logit gradient falls as 1/T: no T² by default.
    """

    rescales_by_default = False

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.TotalVariation(), **common)


@register_loss("skl")
class SkewKLLoss(DivergenceLoss):
    """KL(p‖α·p + (1−α)·q): skew KL of DistiLLM, bounded.

    See :func:`otkd.functional.skew_kl_divergence`; other arguments as
    :class:`~otkd.losses.base.DistillationLoss`.
    """

    def __init__(self, alpha: float = 0.1, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.SkewKL(alpha=alpha), **common)


@register_loss("srkl")
class SkewReverseKLLoss(DivergenceLoss):
    """KL(q‖α·q + (1−α)·p): skew reverse KL of DistiLLM, bounded.

    See :func:`otkd.functional.skew_reverse_kl_divergence`; other arguments as
    :class:`~otkd.losses.base.DistillationLoss`.
    """

    def __init__(self, alpha: float = 0.1, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.SkewReverseKL(alpha=alpha), **common)


@register_loss("akl")
class AdaptiveKLLoss(DivergenceLoss):
    """(g_h·KL + g_t·RKL)/(g_h + g_t): adaptive KL, weighted by the gaps in head and tail.

    From a stored top-k teacher it is non-negative, and 0 and flat where the student has the stored
    masses, but no bound of the dense value: the tokens that are not stored belong to the tail.

    See :func:`otkd.functional.adaptive_kl_divergence`; other arguments as
    :class:`~otkd.losses.base.DistillationLoss`.
    """

    def __init__(self, head_mass: float = 0.5, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.AdaptiveKL(head_mass=head_mass), **common)


@register_loss("alpha_beta")
class AlphaBetaLoss(DivergenceLoss):
    """α-β-divergence: a family with KL at (1, 0) and reverse KL at (0, 1).

    From a stored top-k teacher it is non-negative, and 0 and flat where the student has the stored
    masses; unless it is KL or another f-divergence (α + β = 1) it is no bound of the dense value.

    See :func:`otkd.functional.alpha_beta_divergence`; other arguments as
    :class:`~otkd.losses.base.DistillationLoss`.
    """

    def __init__(
        self, alpha: float = 0.5, beta: float = 0.5, **common: Unpack[CommonSettings]
    ) -> None:
        super().__init__(formulas.AlphaBeta(alpha=alpha, beta=beta), **common)


@register_loss("uld")
class UniversalLogitLoss(DivergenceLoss):
    """Σ|sorted p − sorted q|: universal logit distillation (ULD), across any two vocabularies.

    A stored top-k teacher must hold the k heaviest tokens: they are compared with the student's k
    heaviest, and the mass of all others with that of all others, a lower bound of the whole.

    See :func:`otkd.functional.universal_logit_distance`; arguments as
    :class:`~otkd.losses.base.DistillationLoss`. Its logit gradient falls as 1/T: no T² by default.
    """

    rescales_by_default = False

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        super().__init__(formulas.UniversalLogit(), **common)

    @property
    def bridges_vocabularies(self) -> bool:
        """True: ranks are compared, not tokens."""
        return True


@register_loss("ce")
class CrossEntropyLoss(DistillationLoss):
    """−log q(label): hard labels only, in the common call; the teacher is not used.

    ``temperature`` divides the student's logits; arguments as
    :class:`~otkd.losses.base.DistillationLoss`. Like every loss it takes ``teacher_temperature``
    and the teacher's size in ``vocab_size``, so that one set of options serves all losses; both are
    about the teacher, which is not read.
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
