"""A stored teacher with dense student logits: common atoms, or dense teacher logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkd.precision import compute_dtype
from otkd.teachers.atoms import rounding_of, same_up_to_rounding
from otkd.teachers.slots import Slots

if TYPE_CHECKING:
    from otkd.teachers.masses import StoredMasses


def atoms_beside(logits: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """Logits of the k + 1 atoms, ``(*batch, k + 1)``, from those of all tokens.

    The tail's logit is the log-sum-exp of the logits of all other tokens. Also returns the softmax
    over these, ``(*batch, vocab)``, which is undefined at the stored tokens, and where no others
    have mass.
    """
    head = logits.gather(-1, slots.tokens).masked_fill(slots.empty, -torch.inf)
    lowest = torch.finfo(logits.dtype).min  # a row of only −inf would have no softmax
    others = slots.write(logits.clone(), lowest)
    largest = others.amax(-1, keepdim=True)
    shares = others.softmax(-1)
    tail = largest - shares.amax(-1, keepdim=True).log()
    return torch.cat([head, tail.masked_fill(largest <= lowest, -torch.inf)], -1), shares


def evenly_spread_logits(teacher: StoredMasses) -> Tensor:
    """See :meth:`otkd.teachers.TopKTeacher.logits`."""
    log_atoms, slots = teacher.log_atoms(), teacher.slots
    logits = _log_even_share(teacher, log_atoms, slots).expand(teacher.shape).clone()
    return slots.write(logits, log_atoms[..., :-1]).mul_(teacher.temperature)


@torch.no_grad()
def logits_shaped_by(teacher: StoredMasses, student_logits: Tensor, temperature: float) -> Tensor:
    """See :meth:`otkd.teachers.TopKTeacher.logits_beside`."""
    student = student_logits.to(compute_dtype(student_logits))
    scaled, slots = student / temperature, teacher.slots
    log_p = teacher.log_atoms().to(scaled.dtype)
    log_q, _ = atoms_beside(scaled, slots)
    p, q = log_p.softmax(-1), log_q.softmax(-1)
    others = torch.where(
        log_q[..., -1:] == -torch.inf,
        _log_even_share(teacher, log_p, slots),
        scaled - log_q[..., -1:] + log_p[..., -1:],
    )
    logits = slots.write(others, log_p[..., :-1]).mul_(teacher.temperature)
    same = same_up_to_rounding(q, p, log_p, teacher.log_masses.dtype)
    return torch.where(same, student * (teacher.temperature / temperature), logits)


def certainly_heavier(log_q: Tensor, teacher: StoredMasses) -> Tensor:
    """Tokens that are not stored and certainly more probable in the student than in the teacher.

    In the teacher such a token has at most the mass of the tail, and at most that of the least
    probable stored token. Inference servers may add the sampled token to the most probable ones,
    with any probability; therefore the second least probable stored token is used.

    Args:
        log_q: log-probabilities of the student's tokens, ``(positions, any)``.
        teacher: at the same positions.
    """
    masses = teacher.masses(log_q.dtype)
    rounding = rounding_of(masses, masses.log(), teacher.log_masses.dtype)[..., -1:]
    stored = masses[..., :-1].masked_fill(teacher.slots.empty, torch.inf).sort(-1).values
    lightest_but_one = stored[..., 1:2] if teacher.k > 1 else torch.inf
    bound = masses[..., -1:].clamp(max=lightest_but_one)
    return log_q.exp() > bound + 2 * rounding


def _log_even_share(teacher: StoredMasses, log_atoms: Tensor, slots: Slots) -> Tensor:
    """Log-probability of each other token if they share the tail evenly, ``(*batch, 1)``."""
    stored = (~slots.empty).sum(-1, keepdim=True)
    return log_atoms[..., -1:] - (teacher.vocab_size - stored).clamp(min=1).log()
