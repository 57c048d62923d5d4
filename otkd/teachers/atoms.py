"""The k + 1 masses of a position of a stored teacher: its tokens, and the tail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkd.precision import compute_dtype
from otkd.teachers.slots import complete_positions

if TYPE_CHECKING:
    from otkd.teachers.masses import StoredMasses

_ROUNDING = 32  # in units in the last place: the error of a few operations on a probability
_STEEPEST = 1e5  # a mass of 0 has no rounding error, though its logarithm is −inf


def atom_masses(teacher: StoredMasses, dtype: torch.dtype | None = None) -> Tensor:
    """See :meth:`otkd.teachers.TopKTeacher.masses`."""
    stored, _, total, complete = _stored_masses(teacher, dtype)
    head = stored / torch.where(complete, total, total.clamp(min=1))
    # Positions without a teacher stay NaN.
    return torch.cat([head, (1 - total).clamp(min=0).masked_fill(complete, 0)], -1)


def log_atom_masses(teacher: StoredMasses) -> Tensor:
    """See :meth:`otkd.teachers.TopKTeacher.log_atoms`."""
    _, empty, total, complete = _stored_masses(teacher)
    rest = (1 - total).clamp(min=torch.finfo(total.dtype).eps).masked_fill(complete, 0)
    head = teacher.log_masses.to(total.dtype).masked_fill(empty, -torch.inf)
    head = head - torch.where(complete, total, total.clamp(min=1)).log()
    return torch.cat([head, rest.log()], -1)


def _stored_masses(
    teacher: StoredMasses, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stored masses, the empty slots, the sums of the masses, and the complete positions."""
    stored = teacher.log_masses.to(dtype or compute_dtype(teacher.log_masses)).exp()
    empty = teacher.slots.empty
    stored = stored.masked_fill(empty, 0)
    complete = complete_positions(teacher.tokens, teacher.vocab_size).unsqueeze(-1)
    return stored, empty, stored.sum(-1, keepdim=True), complete


def rounding_of(p: Tensor, log_p: Tensor, stored_dtype: torch.dtype) -> Tensor:
    """A bound of the rounding error of the atoms' masses, ``(*batch, k + 1)``.

    It includes the stored logarithms, the sum from which the tail is computed, and the arithmetic.
    """
    of_logarithm = torch.finfo(stored_dtype).eps * log_p.abs().clamp(min=1, max=_STEEPEST)
    relative = of_logarithm + _ROUNDING * torch.finfo(p.dtype).eps
    absolute = (p * relative)[..., :-1]
    of_sum = absolute.sum(-1, keepdim=True) + _ROUNDING * torch.finfo(p.dtype).eps
    return torch.cat([absolute + p[..., :-1] * of_sum, of_sum], -1)


def same_up_to_rounding(q: Tensor, p: Tensor, log_p: Tensor, stored_dtype: torch.dtype) -> Tensor:
    """Where the student has the stored masses, ``(*batch, 1)``.

    There, the student's own masses replace the teacher's. The gradient of absolute values, of exact
    transport and of transport at costs far above ε depends on the sign of a difference, even if it
    is only rounding.
    """
    rounding = rounding_of(p, log_p, stored_dtype)
    return ((q - p).abs() <= rounding).all(-1, keepdim=True)
