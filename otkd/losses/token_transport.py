"""The base of the losses that transport q to p over the tokens of each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from otkd.checks import check_choice
from otkd.costs import Cost
from otkd.functional.transport import TokenTransport
from otkd.losses.base import Batch, DistillationLoss
from otkd.losses.explain import Explanation, explain_position
from otkd.ot.options import Objective, SolverSettings
from otkd.supports import BACKENDS, Support, as_support, choose_support
from otkd.teachers import StoredTeacher, TopKTeacher


class TokenTransportLoss(DistillationLoss):
    """Base of the losses that transport q to p over the tokens of each position.

    A subclass calls :meth:`_set_up` in its constructor.
    """

    reads_stored = True
    rescales_by_default = False

    def _set_up(
        self,
        *,
        cost: Cost,
        support: str | Support,
        objective: Objective,
        solver: SolverSettings,
        backend: str,
    ) -> None:
        check_choice("backend", backend, BACKENDS)
        self.backend = backend
        self.objective = objective
        self.solver = solver
        self.cost = cost
        self.support = as_support(support)

    @property
    def _value_unit(self) -> float:
        """By what the value of the transport problem is divided in the loss."""
        return 1.0

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether the cost is between two different vocabularies."""
        return self.cost.bridges_vocabularies

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        values, self.last_report = self._transport(batch).divergence(
            batch.student_logits, batch.teacher_logits, self.objective
        )
        return values

    def _transport(self, batch: Batch) -> TokenTransport:
        return TokenTransport(
            cost=self.cost,
            support=self.support,
            solver=self.solver,
            backend=self.backend,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            mask=batch.counted,
            stored=batch.stored,
        )

    def explain(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | StoredTeacher,
        tokenizer: Any = None,
        position: int | Sequence[int] = 0,
        *,
        top: int | None = 20,
    ) -> Explanation:
        """The transport plan at one position: which mass moves from where to where.

        It is that of OT_ε(q, p), or of the relaxed problem of this loss. The tail is shown as one
        atom, or one for each cluster of the support.

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
        explanation = explain_position(
            self._transport(batch),
            batch.student_logits,
            batch.teacher_logits,
            position,
            objective=self.objective,
            tokenizer=tokenizer,
            top=top,
        )
        return replace(explanation, value=explanation.value / self._value_unit)

    def with_self_term(self, teacher: TopKTeacher) -> TopKTeacher:
        """A copy of the stored teacher with the solved self-term U(p, p) of this loss.

        Debiasing subtracts ½·U(p, p) or, as :class:`~otkd.TransportKLLoss` does, U(p, p) with its
        gradient in q. Both follow from the target potentials of U(p, p), the transport of p to
        itself, which do not depend on the student. Solved once and stored with the teacher, this
        problem is not solved again in every training step. A loss with other settings issues a
        warning and solves its own.

        Args:
            teacher: stored at the temperature at which this loss reads it.

        Returns:
            A copy of ``teacher`` with ``self_potential`` and ``self_settings``.

        Raises:
            TypeError: if ``teacher`` is not a :class:`~otkd.TopKTeacher`.
            ValueError: if this loss has no self-term that can be stored. It needs a ``TopK``
                support with one tail atom, a constant cost, ``value="dual"``, and
                ``debias="sinkhorn"`` without ``marginal_relaxation`` or, over one vocabulary,
                ``debias="teacher"``.

        Example:
            >>> cost = otkd.costs.EmbeddingCost(torch.arange(100.0).unsqueeze(-1))
            >>> loss = otkd.TransportKLLoss(cost, support=otkd.supports.TopK(4))
            >>> teacher_logits = 0.1 * torch.arange(200.0).reshape(2, 100)
            >>> stored = otkd.TopKTeacher.from_logits(teacher_logits, k=4)
            >>> loss.with_self_term(stored)
            TopKTeacher((2, 100), k=4, temperature=1.0, with self-term)
        """
        if not isinstance(teacher, TopKTeacher):
            raise TypeError(
                f"with_self_term needs a TopKTeacher, got {type(teacher).__name__}: no other "
                "teacher keeps a self-term"
            )
        teacher.check_temperature(self.teacher_temperature or self.temperature)
        support = self.support or choose_support(teacher.vocab_size, teacher.vocab_size)
        potential, settings = support.stored_self_term(
            teacher, self.cost, self.objective, self.solver
        )
        return replace(teacher, self_potential=potential, self_settings=settings)
