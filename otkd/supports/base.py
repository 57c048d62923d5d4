"""The base class of all supports, and the transport problems that a support selects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from otkd.checks import check_finite_rows
from otkd.costs import Cost, CostMatrices
from otkd.ot.divergence import SolverReport, solve_divergence
from otkd.ot.options import Objective, SolverSettings
from otkd.teachers import TopKTeacher
from otkd.teachers.self_term import SelfTermSettings


@dataclass(frozen=True)
class Positions:
    """The logits of all positions, and which positions count.

    Attributes:
        student: ``(positions, vocab)``, including positions that do not count.
        teacher: ``(positions, teacher_vocab)``; a constant. NaN if ``stored`` is given.
        counted: indices of the positions that count, or None if all do.
        temperature: divides the student's logits.
        teacher_temperature: divides the teacher's logits.
        stored: the stored top-k teacher ``(positions, k)``, in place of the teacher's logits.
    """

    student: Tensor
    teacher: Tensor
    counted: Tensor | None
    temperature: float
    teacher_temperature: float
    stored: TopKTeacher | None = None

    def counted_stored(self) -> TopKTeacher:
        """The stored teacher at the positions that count."""
        assert self.stored is not None
        return self.stored if self.counted is None else self.stored[self.counted]

    def __len__(self) -> int:
        return len(self.student) if self.counted is None else len(self.counted)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of all computations: float64 for float64 logits, else float32."""
        return torch.float64 if self.student.dtype == torch.float64 else torch.float32

    def blocks(self, size: int) -> Iterator[slice | Tensor]:
        """Row indices of the positions that count, at most ``size`` at a time."""
        if self.counted is not None:
            yield from self.counted.split(size)
        else:
            for start in range(0, len(self.student), size):
                yield slice(start, start + size)

    def student_block(self, rows: slice | Tensor) -> Tensor:
        """The student's logits divided by the temperature."""
        return over_temperature(self.student[rows], self.temperature, self.dtype)

    def teacher_block(self, rows: slice | Tensor) -> Tensor:
        """The teacher's logits divided by its temperature."""
        return over_temperature(self.teacher[rows], self.teacher_temperature, self.dtype)


def over_temperature(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """``logits / temperature`` in ``dtype``; no copy is made if nothing changes."""
    logits = logits.to(dtype)
    return logits if temperature == 1 else logits / temperature


def check_softmax(name: str, normaliser: Tensor) -> None:
    """Raise ``ValueError`` if the log-sum-exp of a row of logits is not finite."""
    check_finite_rows(normaliser.detach(), f"{name} without a softmax")


@dataclass(frozen=True, kw_only=True)
class Block:
    """The transport problems of N positions, in the form that the solver takes.

    The *atoms* of a side are its tokens, or sets of tokens that are treated as one point.

    Attributes:
        log_source: log masses of the student's atoms, ``(N, n)``; differentiable in the logits.
        log_target: log masses of the teacher's atoms, ``(N, m)``.
        costs: between the atoms of the two sides and, for debiasing, within each side.
        target_potential: target potentials of the transport of the teacher to itself, ``(N, m)``,
            if they are known; see :func:`otkd.ot.divergence.solve_divergence`.
        places: the index of each position among those that count, ``(N,)``; None if the blocks are
            in the order of the positions.
        tokens: token ids of the student's and the teacher's atoms, ``(N, ≤ n)`` and ``(N, ≤ m)``.
            Atoms beyond these columns stand for several tokens. None if atom i is token i.
    """

    log_source: Tensor
    log_target: Tensor
    costs: CostMatrices
    target_potential: Tensor | None = None
    places: Tensor | None = None
    tokens: tuple[Tensor, Tensor] | None = None

    def solve(self, objective: Objective, solver: SolverSettings) -> tuple[Tensor, SolverReport]:
        """The values of these problems, ``(N,)``, and what the solver did."""
        solution = solve_divergence(
            self.log_source.exp(),
            self.log_target.exp(),
            self.costs,
            objective,
            solver,
            logs=(self.log_source, self.log_target),
            target_potential=self.target_potential,
        )
        return solution.value, solution.report


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The transport problems of all positions that count.

    Attributes:
        blocks: each with some of the positions; computed while they are iterated over.
        support: name of the support, for reports.
        backend: what computes the products with the kernel.
        coverage: probability mass of the tokens that are atoms of their own, ``(positions,)``; None
            if all tokens are.
    """

    blocks: Iterable[Block]
    support: str
    backend: str = "torch"
    coverage: Tensor | None = None


class Support(ABC):
    """Selects the tokens that take part in the transport of a position.

    The selection is a constant for the gradient.

    Attributes:
        backends: backends besides torch.
        reads_stored: whether it can use ``positions.stored`` in place of the teacher's logits.
    """

    backends: ClassVar[tuple[str, ...]] = ()
    reads_stored: ClassVar[bool] = False

    def check(self, cost: Cost, n: int, m: int, objective: Objective, backend: str) -> None:
        """Raise ``ValueError`` if this cost over n and m tokens cannot be handled so."""
        cost.check_size(n, m)
        if objective.debias is not None:
            cost.check_within()
        if objective.debias == "teacher" and (cost.learns or not cost.one_vocabulary):
            why = "a constant cost" if cost.learns else "one vocabulary for student and teacher"
            raise ValueError(
                f"debias='teacher' requires {why}: use debias=None, or debias='sinkhorn' for a "
                "symmetric marginal relaxation"
            )
        backends = ("auto", "torch", *self.backends)
        if backend not in backends:
            raise ValueError(
                f"{type(self).__name__} has the backends {', '.join(map(repr, backends))}, "
                f"got {backend!r}"
            )

    @abstractmethod
    def select(
        self, positions: Positions, cost: Cost, objective: Objective, backend: str
    ) -> Selection:
        """The transport problems of the positions that count; nothing is solved."""

    def stored_self_term(
        self, teacher: TopKTeacher, cost: Cost, objective: Objective, solver: SolverSettings
    ) -> tuple[Tensor, SelfTermSettings]:
        """The target potentials of U(p, p) at every stored position, and their settings.

        Raises:
            ValueError: if this support has no self-term that can be stored.
        """
        raise ValueError(f"the self-term cannot be stored: the support is {self!r}, not a TopK")
