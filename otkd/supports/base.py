"""What a support is: from the logits of the positions that count to their transport problems."""

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
from otkd.ot.options import Options
from otkd.teachers import TopKTeacher
from otkd.teachers.self_term import SelfTermSettings


@dataclass(frozen=True)
class Positions:
    """The logits of the positions that count.

    Attributes:
        student: ``(positions, vocab)``, all of them.
        teacher: ``(positions, teacher_vocab)``; a constant.
        counted: indices of those that count, or None where all do.
        temperature: divides the student's logits.
        teacher_temperature: divides the teacher's.
        stored: what is known of the teacher, ``(positions, k)``, where it is not its logits: those
            are NaN.
    """

    student: Tensor
    teacher: Tensor
    counted: Tensor | None
    temperature: float
    teacher_temperature: float
    stored: TopKTeacher | None = None

    def counted_stored(self) -> TopKTeacher:
        """What is stored of the positions that count."""
        assert self.stored is not None
        return self.stored if self.counted is None else self.stored[self.counted]

    def __len__(self) -> int:
        return len(self.student) if self.counted is None else len(self.counted)

    @property
    def dtype(self) -> torch.dtype:
        """The precision everything is computed in: float64 for float64 logits, else float32."""
        return torch.float64 if self.student.dtype == torch.float64 else torch.float32

    def blocks(self, size: int) -> Iterator[slice | Tensor]:
        """What selects the rows that count, at most ``size`` at a time."""
        if self.counted is not None:
            yield from self.counted.split(size)
        else:
            for start in range(0, len(self.student), size):
                yield slice(start, start + size)

    def student_block(self, rows: slice | Tensor) -> Tensor:
        """The student's logits over the temperature."""
        return over_temperature(self.student[rows], self.temperature, self.dtype)

    def teacher_block(self, rows: slice | Tensor) -> Tensor:
        """The teacher's logits over its temperature."""
        return over_temperature(self.teacher[rows], self.teacher_temperature, self.dtype)


def over_temperature(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """``logits / temperature`` in ``dtype``; nothing is computed where nothing changes."""
    logits = logits.to(dtype)
    return logits if temperature == 1 else logits / temperature


def check_softmax(name: str, normaliser: Tensor) -> None:
    """Raise ``ValueError`` where the log-sum-exp of a row of logits is not finite."""
    check_finite_rows(normaliser.detach(), f"{name} without a softmax")


@dataclass(frozen=True, kw_only=True)
class Block:
    """The transport problems of N positions: what the solver needs, and nothing else.

    Attributes:
        source: masses of the student's atoms, ``(N, n)``; differentiable in the logits.
        target: masses of the teacher's atoms, ``(N, m)``.
        costs: between the atoms of the two sides and, for debiasing, within each.
        target_value: OT_ε(p, p) where it is known, ``(N,)``.
        places: the place of each of these positions among those that count, ``(N,)``; None where
            blocks come in the order of the positions.
        tokens: tokens of the student's and of the teacher's atoms, ``(N, ≤ n)`` and ``(N, ≤ m)``;
            atoms beyond these columns stand for several tokens. None where the i-th atom is the
            i-th token.
    """

    source: Tensor
    target: Tensor
    costs: CostMatrices
    target_value: Tensor | None = None
    places: Tensor | None = None
    tokens: tuple[Tensor, Tensor] | None = None

    def solve(self, options: Options) -> tuple[Tensor, SolverReport]:
        """The values of these problems, ``(N,)``, and what the solver did."""
        solution = solve_divergence(
            self.source, self.target, self.costs, options, target_value=self.target_value
        )
        return solution.value, solution.report


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The transport problems of all positions that count.

    Attributes:
        blocks: of some positions each, made when they are asked for.
        support: which atoms take part, for reports.
        backend: what computes the products with the kernel.
        coverage: probability mass of the tokens that take part one by one, ``(positions,)``; None
            where all tokens do.
    """

    blocks: Iterable[Block]
    support: str
    backend: str = "torch"
    coverage: Tensor | None = None


class Support(ABC):
    """Which tokens take part in the transport of a position; a constant for the gradient.

    Attributes:
        backends: what can compute it beside torch.
        reads_stored: whether ``positions.stored`` will do in the place of the teacher's logits.
    """

    backends: ClassVar[tuple[str, ...]] = ()
    reads_stored: ClassVar[bool] = False

    def check(self, cost: Cost, n: int, m: int, options: Options) -> None:
        """Raise ``ValueError`` if this cost over n and m tokens cannot be handled so."""
        cost.check_size(n, m)
        if options.debias:
            cost.check_within()
        backends = ("auto", "torch", *self.backends)
        if options.backend not in backends:
            raise ValueError(
                f"{type(self).__name__} has the backends {', '.join(map(repr, backends))}, "
                f"got {options.backend!r}"
            )

    @abstractmethod
    def select(self, positions: Positions, cost: Cost, options: Options) -> Selection:
        """The transport problems of the positions that count; nothing is solved."""

    def stored_self_term(
        self, teacher: TopKTeacher, cost: Cost, options: Options
    ) -> tuple[Tensor, SelfTermSettings]:
        """The potentials of OT_ε(p, p) at every stored position; see the support that has them.

        Raises:
            ValueError: if there is no such term that could be stored.
        """
        raise ValueError(
            f"the self-term of the teacher cannot be stored: the support is {self!r}, not a TopK"
        )
