"""Divergences from a stored top-k teacher.

Both sides are distributions over k + 1 atoms: the stored tokens, and one atom for all others (the
tail). By the data processing inequality an f-divergence over atoms is at most the divergence over
tokens. It grows with k, and is equal if all tokens are stored. It is 0, with zero gradient, exactly
where the student has the stored masses.

The student's distribution over atoms is the softmax of the logits of the stored tokens and, for the
tail, the log-sum-exp of all other logits. The chain rule of :mod:`otkd.functional.rowwise` gives
the gradient in these k + 1 numbers. A tail token i receives the share q_i/q_tail of the tail's
gradient. This share is the softmax over the tail, which is accurate even if the tail has almost no
mass.
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
    """The distributions over the stored tokens and, last, the tail."""

    tail = True

    def __init__(self, student: Tensor, teacher: Tensor, stored_dtype: torch.dtype):
        super().__init__(student, teacher)
        self._stored_dtype = stored_dtype

    @functools.cached_property
    def difference(self) -> Tensor:
        """The difference q − p, and 0 where it is within the rounding error of the stored masses.

        Otherwise the sign of rounding errors would give a gradient at student = teacher.
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
            # Ranks are compared: the most probable tokens of each side, as many as are stored.
            head = teacher[:, :-1].sort(-1, descending=True).values
            teacher = torch.cat([head, teacher[:, -1:]], -1)
            k = min(stored.k, student.shape[-1])
            slots = Slots.of(student.topk(k).indices, head[:, :k] == -torch.inf)
        atoms, shares = atoms_beside(student, slots)
        missing = teacher.shape[-1] - atoms.shape[-1]  # if the student has fewer tokens
        if missing:
            head, tail = atoms.split([atoms.shape[-1] - 1, 1], -1)
            atoms = torch.cat([pad(head, (0, missing), value=-torch.inf), tail], -1)
        pair = AtomPair(atoms, teacher, stored.log_masses.dtype)
        return pair, functools.partial(_spread, slots, shares)


def _spread(slots: Slots, shares: Tensor, gradient: Tensor, place: Tensor | None) -> Tensor:
    """The gradient in the logits of all tokens, from the gradient in the logits of the atoms."""
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
        formula: the divergence.
        student_logits: ``(*batch, vocab)``.
        stored: the teacher at the same positions, at its own temperature.
        temperature: divides the student's logits.
        mask: ``(*batch,)``; where it is zero, the value is 0 and both sides may hold any value.

    Raises:
        TypeError, ValueError: for a mask that does not fit, and NaN in a counted position.
    """
    teacher = StoredTeacher(stored.flatten())
    return compare_rowwise(formula, student_logits, teacher, temperature=temperature, mask=mask)
