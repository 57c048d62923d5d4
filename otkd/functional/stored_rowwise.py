"""Divergences from a stored teacher of which only the heaviest tokens are known.

Both sides are distributions over k + 1 atoms: the stored tokens, and one atom for all others (the
tail). By the data processing inequality an f-divergence over atoms is at most the one over tokens;
it grows with k, and is the same where all tokens are stored. It is 0 exactly where the student has
the stored masses, and flat there.

The student's distribution over atoms is the softmax of the logits of the stored tokens and, for the
tail, the log-sum-exp of all other logits. So the chain rule of :mod:`otkd.functional.rowwise` gives
the gradient in these k + 1 numbers, and a tail token i receives the share q_i/q_tail of the tail's,
which is the softmax over the tail and exact where the tail has hardly any mass.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from otkd.functional.rowwise import Formula, Pair, Spread, Teacher, compare_rowwise
from otkd.teachers import TopKTeacher
from otkd.teachers.atoms import rounding_of
from otkd.teachers.beside import atoms_beside
from otkd.teachers.slots import Slots


class AtomPair(Pair):
    """The distributions over the stored tokens and, last, all others."""

    tail = True

    def __init__(self, student: Tensor, teacher: Tensor, stored_dtype: torch.dtype):
        super().__init__(student, teacher)
        self._stored_dtype = stored_dtype

    @functools.cached_property
    def difference(self) -> Tensor:
        """Q − p, and 0 where it is no more than the rounding of what is stored.

        A sign of rounding errors would be a gradient where student and teacher are the same.
        """
        gap = self.q - self.p
        return gap.masked_fill_(gap.abs() <= rounding_of(self.p, self.log_p, self._stored_dtype), 0)


class StoredTeacher(Teacher):
    """A stored teacher of N positions."""

    def __init__(self, teacher: TopKTeacher):
        self.teacher = teacher

    def compare(
        self, student: Tensor, rows: slice | Tensor, formula: Formula
    ) -> tuple[Pair, Spread]:
        """See :class:`~otkd.functional.rowwise.Teacher`."""
        stored = self.teacher[rows]
        teacher, slots = stored.log_atoms().to(student.dtype), stored.slots
        if not formula.same_vocabulary:
            # Ranks are compared: the heaviest tokens of each side, as many as are stored.
            head = teacher[:, :-1].sort(-1, descending=True).values
            teacher = torch.cat([head, teacher[:, -1:]], -1)
            k = min(stored.k, student.shape[-1])
            slots = Slots.of(student.topk(k).indices, head[:, :k] == -torch.inf)
        atoms, shares = atoms_beside(student, slots)
        missing = teacher.shape[-1] - atoms.shape[-1]  # in a student of fewer tokens
        if missing:
            head, tail = atoms.split([atoms.shape[-1] - 1, 1], -1)
            atoms = torch.cat([pad(head, (0, missing), value=-torch.inf), tail], -1)
        pair = AtomPair(atoms, teacher, stored.log_masses.dtype)
        return pair, functools.partial(_spread, slots, shares)


def _spread(slots: Slots, shares: Tensor, gradient: Tensor, place: Tensor | None) -> Tensor:
    """The gradient in the logits of all tokens, from that in those of the atoms."""
    gradient = gradient.to(shares.dtype)
    everywhere = torch.mul(shares, gradient[:, -1:], out=shares if place is None else place)
    return slots.write(everywhere, gradient[:, : slots.tokens.shape[-1]])


def stored_divergence(
    formula: Formula,
    student_logits: Tensor,
    stored: TopKTeacher,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The divergence that ``formula`` defines between the k + 1 atoms of both sides, ``(*batch,)``.

    Args:
        formula: what is compared.
        student_logits: ``(*batch, vocab)``.
        stored: the teacher at the same positions, at its own temperature.
        temperature: divides the student's logits.
        mask: ``(*batch,)``; where it is zero the value is 0 and both sides may hold anything.

    Raises:
        TypeError, ValueError: for a mask that does not fit, and NaN in a counted position.
    """
    teacher = StoredTeacher(stored.flatten())
    return compare_rowwise(formula, student_logits, teacher, temperature=temperature, mask=mask)
