"""Changes of a stored teacher's size: fewer tokens, more slots, positions or examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from otkd.teachers.slots import complete_positions

if TYPE_CHECKING:
    from otkd.teachers.topk import TopKTeacher


def sliced_teacher(
    teacher: TopKTeacher, vocab_size: int, counted: Tensor | None = None
) -> TopKTeacher:
    """See :meth:`otkd.teachers.TopKTeacher.sliced`."""
    if vocab_size >= teacher.vocab_size:
        return teacher
    padding = teacher.tokens >= vocab_size
    complete = complete_positions(teacher.tokens, teacher.vocab_size).unsqueeze(-1)
    heavy = padding & ~complete & (teacher.log_masses > -torch.inf)
    if (heavy if counted is None else heavy[counted]).any():
        raise ValueError(
            f"the stored teacher has mass on padding tokens (from {vocab_size} on), and its masses "
            "cannot be renormalised because not all tokens are stored: rebuild it from logits[..., "
            ":vocab_size]"
        )
    sliced = replace(teacher, tokens=teacher.tokens.masked_fill(padding, -1))
    if sliced.k > vocab_size:
        sliced = _narrowed(sliced, vocab_size)
    return replace(sliced, vocab_size=vocab_size)


def widened_teacher(teacher: TopKTeacher, k: int) -> TopKTeacher:
    """The teacher, with empty slots added up to ``k``."""
    missing = k - teacher.k
    if not missing:
        return teacher
    potential = teacher.self_potential
    if potential is not None:
        stored, tail = potential.split([teacher.k, 1], -1)
        potential = torch.cat([pad(stored, (0, missing)), tail], -1)
    return replace(
        teacher,
        tokens=pad(teacher.tokens, (0, missing), value=-1),
        log_masses=pad(teacher.log_masses, (0, missing), value=-torch.inf),
        self_potential=potential,
    )


def _narrowed(teacher: TopKTeacher, k: int) -> TopKTeacher:
    """The first ``k`` slots, after the empty ones have been moved to the end."""
    empty = teacher.slots.empty.to(torch.uint8)
    order = (empty + (teacher.tokens < 0)).sort(dim=-1, stable=True).indices[..., :k]
    potential = teacher.self_potential
    if potential is not None:
        potential = torch.cat([potential.gather(-1, order), potential[..., -1:]], -1)
    return replace(
        teacher,
        tokens=teacher.tokens.gather(-1, order),
        log_masses=teacher.log_masses.gather(-1, order),
        self_potential=potential,
    )


def lengthened_teacher(teacher: TopKTeacher, length: int) -> TopKTeacher:
    """See :meth:`otkd.teachers.TopKTeacher.with_length`."""
    missing = length - teacher.tokens.shape[1]
    if missing <= 0:
        return teacher[:, :length]
    return teacher._map(lambda tensor: _lengthened(tensor, missing))


def _lengthened(tensor: Tensor, missing: int) -> Tensor:
    filling = tensor.new_empty(len(tensor), missing, *tensor.shape[2:])
    filling.fill_(torch.nan if filling.is_floating_point() else -1)
    return torch.cat([tensor, filling], 1)


def concatenated_teachers(teachers: Sequence[TopKTeacher]) -> TopKTeacher:
    """See :meth:`otkd.teachers.TopKTeacher.cat`."""
    kinds = {(t.shape[1:], t.temperature, t.self_settings) for t in teachers}
    if len(kinds) != 1:
        raise ValueError(
            "stored teachers can only be concatenated if they differ only in their number of "
            f"examples and k, got {', '.join(map(repr, teachers)) or 'none'}. with_length() makes "
            "lengths equal"
        )
    k = max(t.k for t in teachers)
    teachers = [widened_teacher(t, k) for t in teachers]
    potentials = [t.self_potential for t in teachers if t.self_potential is not None]
    return replace(
        teachers[0],
        tokens=torch.cat([t.tokens for t in teachers]),
        log_masses=torch.cat([t.log_masses for t in teachers]),
        self_potential=torch.cat(potentials) if potentials else None,
    )
