"""Losses that transport the student's token distribution to the teacher's, position by position."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from otkd.costs import Cost
from otkd.functional.transport import sinkhorn_with_report, wasserstein_distance
from otkd.losses.base import Batch, CommonSettings, DistillationLoss
from otkd.losses.explain import Explanation, explain_position
from otkd.losses.ground_cost import make_cost
from otkd.losses.registry import register_loss
from otkd.ot.options import Options
from otkd.scalars import as_positive
from otkd.supports import Support, as_support, choose_support
from otkd.teachers import StoredTeacher, TopKTeacher


@register_loss("sinkhorn")
class SinkhornLoss(DistillationLoss):
    """Debiased entropic transport between q and p over tokens, with a cost that knows meaning.

    S_ε(q, p) = OT_ε(q, p) − ½·OT_ε(q, q) − ½·OT_ε(p, p), with
    OT_ε(q, p) = min_P ⟨P, C⟩ + ε·KL(P‖q⊗p). Gradients by the envelope theorem: memory does not
    grow with the iterations. Its logit gradient falls about as T^−1.5: no T² by default.

    Args:
        cost: ``"embedding"``, ``"discrete"`` (0/1), ``"ordinal"`` (|i − j|), a ``(vocab, vocab)``
            tensor, or an object of :mod:`otkd.costs`.
        embedding: ``(vocab, width)``, for ``cost="embedding"``: squared distances of these rows,
            divided by their mean. A constant; for one that learns pass
            ``EmbeddingCost(..., learnable=True)`` as cost.
        epsilon: entropic strength in units of the cost; 0.05 to 0.1 is the useful range for a
            normalised cost.
        debias: False leaves OT_ε alone, which is not 0 at p = q.
        value: ``"dual"``, or ``"sharp"`` for ⟨P, C⟩ (gradients by implicit differentiation).
        support: which tokens take part: an object of :mod:`otkd.supports`, or ``"auto"``: every
            token up to 2048, above the 64 heaviest of each side and one atom for the others.
        max_iterations: limit of the solver; reaching it warns and shows in ``last_report``.
        tolerance: L1 marginal error at which a position is solved.
        backend: what computes it: ``"auto"``, ``"torch"``, or another that the support has.
        unbalanced: ρ, in units of the cost: where given, the plan need not have the marginals q and
            p, and ρ·KL of its marginals from them is paid instead. For distributions that disagree
            on support, and for ``TopK(k, tail=False)``, whose heads then keep the mass they have.
            As ρ → ∞ the balanced value; ``math.inf`` is balanced. A pair (ρ_student, ρ_teacher)
            penalises each side by its own, and holds one whose ρ is ``math.inf``; where they differ
            with ``debias=False`` alone. With ``value="dual"`` alone.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.

    Raises:
        TypeError, ValueError: for settings out of range or a cost that cannot be.

    Warns:
        UserWarning: if ``debias`` is asked of a cost for which the divergence is not shown to be
            non-negative.

    Source: Feydy et al. (2019), "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences".
    """

    reads_stored = True
    rescales_by_default = False

    def __init__(
        self,
        cost: str | Tensor | Cost = "embedding",
        embedding: Tensor | None = None,
        *,
        epsilon: float = 0.1,
        debias: bool = True,
        value: str = "dual",
        support: str | Support = "auto",
        max_iterations: int = 200,
        tolerance: float = 1e-4,
        backend: str = "auto",
        unbalanced: float | tuple[float, float] | None = None,
        **common: Unpack[CommonSettings],
    ) -> None:
        super().__init__(**common)
        self.solver_options = Options(
            epsilon=epsilon,
            tolerance=tolerance,
            max_iterations=max_iterations,
            value=value,
            debias=debias,
            unbalanced=unbalanced,
            backend=backend,
        )
        self.cost = make_cost(cost, embedding)
        self.support = as_support(support)
        if debias and not self.cost.keeps_divergence_positive(epsilon):
            warnings.warn(
                f"exp(−C/ε) of this {type(self.cost).__name__} is not shown to be positive "
                f"definite at epsilon={epsilon}: the debiased divergence may be negative and "
                "smallest where p ≠ q. Use debias=False or another cost",
                stacklevel=2,
            )

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether the cost leads from one vocabulary to another."""
        return self.cost.bridges_vocabularies

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        values, self.last_report = sinkhorn_with_report(
            batch.student_logits,
            batch.teacher_logits,
            cost=self.cost,
            support=self.support,
            options=self.solver_options,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            mask=batch.counted,
            stored=batch.stored,
        )
        return values

    def explain(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | StoredTeacher,
        tokenizer: Any = None,
        position: int | Sequence[int] = 0,
        *,
        top: int | None = 20,
    ) -> Explanation:
        """Which mass of the student's goes where at one position: the plan of OT_ε(q, p).

        Args:
            student_logits: as for a call.
            teacher_logits: as for a call.
            tokenizer: names the tokens by its ``convert_ids_to_tokens``; a pair (student's,
                teacher's) where the cost bridges two vocabularies. None leaves their numbers.
            position: an index into the batch of positions: a whole number into it flattened, or one
                for each of its dimensions.
            top: how many of the heaviest moves to keep; None for all.

        Returns:
            An :class:`~otkd.losses.explain.Explanation`; printed, a table.

        Raises:
            IndexError: if there is no such position.
            TypeError, ValueError: for input that a call refuses, a tokenizer that is none, or a
                support that does not hold a plan.
        """
        batch = self._prepare(student_logits, teacher_logits, None, None, None, None)
        return explain_position(
            batch,
            position,
            cost=self.cost,
            support=self.support,
            options=self.solver_options,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            tokenizer=tokenizer,
            top=top,
        )

    def with_self_term(self, teacher: TopKTeacher) -> TopKTeacher:
        """The stored teacher together with its term OT_ε(p, p), solved once for all steps to come.

        That term of the debiased divergence depends neither on the student nor on the student's
        tokens, on which p has no mass, so it can be stored beside the teacher's masses.

        Args:
            teacher: stored at the temperature at which this loss reads it.

        Returns:
            A copy of ``teacher`` with ``self_potential`` and ``self_settings``.

        Raises:
            ValueError: if this loss has no such term that could be stored: it needs a ``TopK``
                support with one tail atom, ``debias``, the dual value, balanced marginals and a
                constant cost.
        """
        teacher.check_temperature(self.teacher_temperature or self.temperature)
        support = self.support or choose_support(teacher.vocab_size, teacher.vocab_size)
        potential, settings = support.stored_self_term(teacher, self.cost, self.solver_options)
        return replace(teacher, self_potential=potential, self_settings=settings)

    def extra_repr(self) -> str:
        """The settings of the transport and the common ones."""
        options = self.solver_options
        return (
            f"epsilon={options.epsilon}, debias={options.debias}, value={options.value!r}, "
            + super().extra_repr()
        )


@register_loss("wasserstein")
class WassersteinLoss(DistillationLoss):
    """Exact transport between q and p over tokens: min_P ⟨P, C^p⟩, no root taken.

    A closed form where one exists (0/1 cost, |i − j|^r with r·p ≥ 1, two tokens); else a linear
    program per position, which is refused above 1024 tokens. The gradient is that of the dual
    potentials. Its logit gradient falls as 1/T: no T² by default.

    Args:
        cost: as for :class:`SinkhornLoss`, without ``"embedding"``: pass an ``EmbeddingCost``.
        p: power of the cost, above 0.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.

    Raises:
        TypeError, ValueError: for settings out of range or a cost that cannot be.

    Source: Peyré and Cuturi (2019), "Computational Optimal Transport".
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
        """Whether the cost leads from one vocabulary to another."""
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
