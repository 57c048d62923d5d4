"""Losses that transport the student's token distribution to the teacher's, at each position."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from otkd.checks import check_choice
from otkd.costs import Cost
from otkd.functional.transport import sinkhorn_with_report, wasserstein_distance
from otkd.losses.base import Batch, DistillationLoss
from otkd.losses.explain import Explanation, explain_position
from otkd.losses.ground_cost import make_cost
from otkd.losses.registry import register_loss
from otkd.losses.settings import CommonSettings
from otkd.ot.options import Objective, SolverSettings
from otkd.scalars import as_positive
from otkd.supports import BACKENDS, Support, as_support, choose_support
from otkd.teachers import StoredTeacher, TopKTeacher


@register_loss("sinkhorn")
class SinkhornLoss(DistillationLoss):
    """Debiased entropic optimal transport between q and p over the tokens of each position.

    S_ε(q, p) = OT_ε(q, p) − ½·OT_ε(q, q) − ½·OT_ε(p, p), with
    OT_ε(q, p) = min_P ⟨P, C⟩ + ε·KL(P‖q⊗p). Gradients follow from the envelope theorem, so memory
    does not grow with the number of iterations. The logit gradient falls about as T^−1.5, so the
    loss is not multiplied by T² by default.

    Args:
        cost: ``"embedding"``, ``"discrete"`` (0/1), ``"ordinal"`` (|i − j|), a ``(vocab, vocab)``
            tensor, or an object of :mod:`otkd.costs`.
        embedding: ``(vocab, width)``, for ``cost="embedding"``: the cost is the squared distance of
            two rows, divided by its mean. The embedding is constant; to train it, pass
            ``EmbeddingCost(..., learnable=True)`` as ``cost``.
        epsilon: strength of the entropic regularisation, in units of the cost. For a normalised
            cost, 0.05 to 0.1 is the useful range.
        debias: with False the loss is OT_ε(q, p), which is not 0 at p = q.
        value: ``"dual"``, or ``"sharp"`` for ⟨P, C⟩ (gradients by implicit differentiation).
        support: which tokens take part: an object of :mod:`otkd.supports`, or ``"auto"``, which is
            ``Dense()`` up to 2048 tokens and ``TopK(64)`` above.
        max_iterations: limit of the solver. If it is reached, a warning is issued and
            ``last_report.converged`` is False.
        tolerance: L1 marginal error at which a position counts as solved.
        backend: what computes the transport: ``"auto"``, ``"torch"``, or another backend of the
            support.
        unbalanced: marginal relaxation ρ, in units of the cost. If given, the marginals of the plan
            may differ from q and p, at the price of ρ·KL of each from its marginal. Use it for
            distributions that disagree on their support, and for ``TopK(k, tail=False)``, whose
            heads then keep their mass. The balanced value is the limit ρ → ∞, and ``math.inf``
            gives it. A pair (ρ_student, ρ_teacher) relaxes each side by its own ρ; two different
            values require ``debias=False``. Requires ``value="dual"``.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.

    Raises:
        TypeError, ValueError: for settings that are out of range or contradict each other.

    Warns:
        UserWarning: if ``debias`` is used with a cost for which the divergence is not known to be
            non-negative.

    Source: Feydy et al. (2019), "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences".

    Example:
        >>> embedding = torch.tensor([[0.0, 0.0], [0.0, 0.1], [3.0, 0.0]])
        >>> loss = otkd.SinkhornLoss(embedding=embedding)
        >>> teacher = torch.tensor([[4.0, 0.0, 0.0]])
        >>> loss(torch.tensor([[0.0, 4.0, 0.0]]), teacher)  # a near token
        tensor(0.0023)
        >>> loss(torch.tensor([[0.0, 0.0, 4.0]]), teacher)  # a far token
        tensor(2.1164)
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
        self.objective = Objective(
            epsilon=epsilon, debias=debias, value=value, unbalanced=unbalanced
        )
        self.solver = SolverSettings(tolerance=tolerance, max_iterations=max_iterations)
        check_choice("backend", backend, BACKENDS)
        self.backend = backend
        self.cost = make_cost(cost, embedding)
        self.support = as_support(support)
        if debias and not self.cost.keeps_divergence_positive(epsilon):
            warnings.warn(
                f"exp(−C/ε) of this {type(self.cost).__name__} is not known to be positive "
                f"definite at epsilon={epsilon}: the debiased divergence may be negative, and "
                "minimal at some p ≠ q. Use debias=False or another cost",
                stacklevel=2,
            )

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether the cost is between two different vocabularies."""
        return self.cost.bridges_vocabularies

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        values, self.last_report = sinkhorn_with_report(
            batch.student_logits,
            batch.teacher_logits,
            cost=self.cost,
            support=self.support,
            objective=self.objective,
            solver=self.solver,
            backend=self.backend,
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
        """The transport plan of OT_ε(q, p) at one position: which mass moves from where to where.

        Args:
            student_logits: as for a call.
            teacher_logits: as for a call.
            tokenizer: its ``convert_ids_to_tokens`` names the tokens. A pair (student's, teacher's)
                for a cost between two vocabularies. With None, tokens are shown as ids.
            position: an index into the batch of positions: one whole number, which counts the
                positions in order, or one number for each batch dimension.
            top: how many of the largest moves to return; None for all.

        Returns:
            An :class:`~otkd.losses.explain.Explanation`, which prints as a table.

        Raises:
            IndexError: if there is no such position.
            TypeError, ValueError: for input that a call refuses, an object that is not a tokenizer,
                or a support that does not hold a plan.
        """
        batch = self._prepare(student_logits, teacher_logits, None, None, None, None)
        return explain_position(
            batch,
            position,
            cost=self.cost,
            support=self.support,
            objective=self.objective,
            solver=self.solver,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            tokenizer=tokenizer,
            top=top,
        )

    def with_self_term(self, teacher: TopKTeacher) -> TopKTeacher:
        """A copy of the stored teacher with the potential of its self-term OT_ε(p, p).

        The debiased divergence needs OT_ε(p, p), which does not depend on the student. Solved once
        and stored with the teacher, it is not solved again in every training step.

        Args:
            teacher: stored at the temperature at which this loss reads it.

        Returns:
            A copy of ``teacher`` with ``self_potential`` and ``self_settings``.

        Raises:
            ValueError: if this loss has no self-term that can be stored. It needs a ``TopK``
                support with one tail atom, ``debias=True``, ``value="dual"``, balanced marginals
                and a constant cost.
        """
        teacher.check_temperature(self.teacher_temperature or self.temperature)
        support = self.support or choose_support(teacher.vocab_size, teacher.vocab_size)
        potential, settings = support.stored_self_term(
            teacher, self.cost, self.objective, self.solver
        )
        return replace(teacher, self_potential=potential, self_settings=settings)

    def extra_repr(self) -> str:
        """The settings of the transport and the common ones."""
        objective = self.objective
        return (
            f"epsilon={objective.epsilon}, debias={objective.debias}, "
            f"value={objective.value!r}, " + super().extra_repr()
        )


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
