"""The distribution that a stored top-k teacher stands for at each position."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from otkd.teachers.atoms import atom_masses, log_atom_masses
from otkd.teachers.beside import evenly_spread_logits, logits_shaped_by
from otkd.teachers.checks import check_distributions
from otkd.teachers.slots import Slots, empty_slots

Stored = TypeVar("Stored", bound="StoredMasses")


@dataclass(frozen=True, repr=False)
class StoredMasses(ABC):
    """Tokens and log-masses, and the distributions and logits that follow from them.

    Its fields are described by :class:`~otkd.teachers.TopKTeacher`, the class to use.
    """

    tokens: Tensor
    log_masses: Tensor
    vocab_size: int
    temperature: float = 1.0

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @abstractmethod
    def __getitem__(self: Stored, index) -> Stored:
        """The chosen examples."""

    @abstractmethod
    def flatten(self: Stored) -> Stored:
        """The same positions with one batch dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits that it replaces, ``(*batch, vocab)``."""
        return (*self.tokens.shape[:-1], self.vocab_size)

    @property
    def k(self) -> int:
        """Number of stored tokens per position."""
        return self.tokens.shape[-1]

    @property
    def tail_mass(self) -> Tensor:
        """Total mass of the tokens that are not stored, ``(*batch,)``."""
        return self.masses()[..., -1]

    @property
    def slots(self) -> Slots:
        """The stored tokens, and which slots are empty."""
        empty = empty_slots(self.tokens, self.log_masses, self.vocab_size)
        # Positions that do not count may hold anything.
        return Slots.of(self.tokens.clamp(max=self.vocab_size - 1), empty)

    def masses(self, dtype: torch.dtype | None = None) -> Shaped[Tensor, "*batch atoms"]:
        """Masses of the stored tokens and, last, of the tail, ``(*batch, k + 1)``; they sum to 1.

        Computed in at least float32. Empty slots have mass 0. If rounding lifts the sum of the
        stored masses above 1, or if all tokens are stored, the masses are divided by their sum.
        """
        return atom_masses(self, dtype)

    def log_atoms(self) -> Shaped[Tensor, "*batch atoms"]:
        """Logarithms of :meth:`masses`, with the tail's mass clamped to the rounding error of 1.

        So no token gets probability 0 by rounding alone. The tail is −inf if all tokens are stored.
        """
        return log_atom_masses(self)

    def logits(self, counted: Tensor | None = None) -> Float[Tensor, "*batch vocab"]:
        """Dense logits in which the tokens that are not stored share the tail's mass evenly.

        The result is ``(*batch, vocab)``, with ``softmax(logits / temperature)`` equal to the
        stored masses at the stored tokens. The real teacher did not spread the tail evenly, so a
        loss of these logits is not 0 at student = teacher. Losses use them only between two
        vocabularies, where :meth:`logits_beside` is not possible.

        Args:
            counted: boolean ``(*batch,)``: the positions to check; all by default.

        Raises:
            ValueError: see :meth:`validate`.
        """
        self.validate(counted)
        return evenly_spread_logits(self)

    def logits_beside(
        self,
        student_logits: Float[Tensor, "*batch vocab"],
        temperature: float | None = None,
        counted: Tensor | None = None,
    ) -> Float[Tensor, "*batch vocab"]:
        """Dense logits in which the tokens that are not stored share the tail as in the student.

        With p_i = p_tail·q_i/q_tail for tokens that are not stored, this is the distribution
        nearest to the student, in every f-divergence, among all that have the stored masses. If the
        student has the stored masses, it is the student's distribution. No gradient flows through
        it.

        Args:
            student_logits: ``(*batch, vocab)``, of the same vocabulary.
            temperature: of the student; by default that of the teacher.
            counted: boolean ``(*batch,)``: the positions to check; all by default.

        Raises:
            ValueError: see :meth:`validate`.
        """
        self.validate(counted)
        return logits_shaped_by(self, student_logits, temperature or self.temperature)

    def without_logits(self) -> Tensor:
        """A placeholder of NaN in the shape of :meth:`logits`, which takes no memory."""
        return self.log_masses.new_full((), torch.nan).expand(self.shape)

    def validate(self: Stored, counted: Tensor | None = None) -> Stored:
        """Return the teacher itself if every position is a distribution over distinct tokens.

        Positions without a teacher may hold NaN masses, and empty slots any token.

        Args:
            counted: boolean ``(*batch,)``: the positions to check; all by default.

        Raises:
            ValueError: for a token that is repeated or not in the vocabulary, or masses of a
                position that add up to more than 1.
        """
        check_distributions(self if counted is None else self[counted])
        return self

    def check_temperature(self, temperature: float) -> None:
        """Raise ``ValueError`` unless a loss uses the temperature of the stored masses."""
        if not math.isclose(self.temperature, temperature, rel_tol=1e-6):
            raise ValueError(
                f"the stored teacher's masses are at temperature {self.temperature}, but the loss "
                f"reads the teacher at {temperature}: set teacher_temperature={self.temperature}, "
                "or store the teacher at the temperature of the loss"
            )
