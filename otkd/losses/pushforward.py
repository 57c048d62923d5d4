"""Any loss over the student's vocabulary, with the teacher's distribution mapped to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from otkd.alignment import TokenMap
from otkd.losses.base import Batch, DistillationLoss
from otkd.losses.batch_base import BatchLoss
from otkd.losses.mapped_loss import MappedLoss
from otkd.losses.registry import get_loss
from otkd.losses.settings import CommonSettings
from otkd.precision import compute_dtype
from otkd.teachers import TopKTeacher
from otkd.tensors import block_elements

_BLOCK_ELEMENTS_ON_CPU = 2**22
_BLOCK_ELEMENTS_ON_DEVICE = 2**27
UNREACHED = 1e-9
_STORED = 4  # at most this many tokens of the student for each stored one


class PushforwardLoss(MappedLoss):
    """A loss from the teacher's distribution mapped to the student's tokens by a ``TokenMap``.

    With M from :func:`otkd.alignment.token_map`, the student's token s has the mass

        p'_s = Σ_t M_ts·p_t / Σ_t Σ_s M_ts·p_t,

    the teacher's distribution given that its next token is one that the student can write, and
    ``loss`` compares p' with q. Positions where no mass is left have the value 0. Tokens of the
    student that no token of the teacher stands for have the mass 1e-9, so that losses with log p'
    stay finite.

    A stored top-k teacher is mapped to the student's tokens for its stored ones; their other tokens
    remain the tail, although some of them stand for the same tokens of the student.

    Args:
        token_map: from :func:`otkd.alignment.token_map`.
        loss: a loss by its registry name, or a loss with its own settings, such as
            ``SkewKLLoss(0.3, temperature=2)``. It must compare distributions of single positions.
        **common: settings of a loss that is given by its name; see
            :class:`~otkd.losses.base.DistillationLoss`. ``vocab_size`` is the pair of this loss;
            pass ``token_map.vocab_size`` if logits are padded.

    Raises:
        TypeError, ValueError: for another kind of map or loss, or settings beside a loss that has
            its own; in a call, if the logits do not have the sizes of the map.

    Example:
        >>> found = otkd.alignment.TokenMap.of_pairs([0, 1], [2, 0], vocab_size=(2, 3))
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0, 0.0]])
        >>> otkd.PushforwardLoss(found)(student, teacher)
        tensor(0.1201)
        >>> otkd.KLLoss()(student, torch.zeros(1, 2))
        tensor(0.1201)
    """

    reads_stored = True

    def __init__(
        self,
        token_map: TokenMap,
        loss: str | DistillationLoss = "kl",
        **common: Unpack[CommonSettings],
    ) -> None:
        vocab_size = common.pop("vocab_size", None)
        if common and not isinstance(loss, str):
            raise ValueError(
                f"{', '.join(common)} must be given to the loss itself, for example "
                f"{type(loss).__name__}({next(iter(common))}=...)"
            )
        inner = _checked_inner(get_loss(loss, **common) if isinstance(loss, str) else loss)
        super().__init__(
            token_map,
            temperature=inner.temperature,
            teacher_temperature=inner.teacher_temperature,
            rescale_t2=inner.rescale_t2,
            reduction=inner.reduction,
            vocab_size=vocab_size,
        )
        self.loss = inner

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        inner = self.loss
        # They may have been annealed.
        inner.temperature, inner.teacher_temperature = self.temperature, self.teacher_temperature
        found = self.map_for(batch)
        if batch.stored is None:
            teacher, has_mass = _pushed_logits(
                found,
                batch.teacher_logits,
                batch.counted,
                self.teacher_temperature or self.temperature,
                compute_dtype(batch.student_logits),
            )
            stored = None
        else:
            stored, has_mass = _pushed_stored(found, batch.stored)
            teacher = stored.without_logits()
            if not inner.reads_stored:
                teacher, stored = inner._expanded(stored, batch.student_logits), None
        counted = has_mass if batch.counted is None else batch.counted & has_mass
        values = inner.per_position(
            replace(batch, teacher_logits=teacher, counted=counted, stored=stored)
        )
        self.last_report = inner.last_report
        return values

    def extra_repr(self) -> str:
        """The sizes of the map."""
        return f"student_tokens, teacher_tokens={self.token_map.vocab_size}"


def _checked_inner(loss: object) -> DistillationLoss:
    name = type(loss).__name__
    if not isinstance(loss, DistillationLoss) or isinstance(loss, BatchLoss | MappedLoss):
        raise TypeError(
            f"the loss of PushforwardLoss must compare distributions of single positions, got "
            f"{name}. Make a pushforward loss of each term of a weighted loss"
        )
    if loss.needs_labels or not loss.needs_teacher:
        raise TypeError(f"the loss of PushforwardLoss must compare distributions, got {name}")
    if loss.vocab_size is not None:
        raise ValueError(
            f"vocab_size={loss.vocab_size} must be given to PushforwardLoss, as a pair (student, "
            "teacher)"
        )
    return loss


def _pushed_logits(
    found: TokenMap,
    logits: Tensor,
    counted: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Logits whose softmax at ``temperature`` is p', and where the mapped tokens have mass.

    Positions that do not count hold 0.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    pushed = logits.new_zeros(len(rows), found.vocab_size[0], dtype=dtype)
    has_mass = torch.ones(len(rows), dtype=torch.bool, device=logits.device)
    unmapped = found.row_sums() == 0
    reached = torch.bincount(found.student, minlength=found.vocab_size[0]) > 0
    for block in _blocks(rows, counted, sum(found.vocab_size)):
        whole = rows[block].to(dtype) / temperature
        part = whole.masked_fill(unmapped, -torch.inf)
        nothing = (part == -torch.inf).all(-1) & ~(whole == -torch.inf).all(-1)
        has_mass[block] = ~nothing
        masses = part.masked_fill(nothing.unsqueeze(-1), 0.0).softmax(-1)
        pushed[block] = found.push(masses).masked_fill(~reached, UNREACHED).log() * temperature
    return pushed.reshape(*logits.shape[:-1], pushed.shape[-1]), has_mass.reshape(logits.shape[:-1])


def _pushed_stored(found: TokenMap, stored: TopKTeacher) -> tuple[TopKTeacher, Tensor]:
    """The stored teacher over the student's tokens, and where it has mass."""
    flat = stored.flatten()
    students, teachers = found.vocab_size
    dtype = torch.promote_types(flat.log_masses.dtype, torch.float32)
    unmapped = found.row_sums() == 0
    tokens, log_masses, shares = [], [], []
    width = min(students, _STORED * flat.k)
    for block in _blocks(flat.tokens, None, students + teachers):
        part = flat[block]
        slots = part.slots
        dense = part.log_masses.new_zeros(len(part), teachers, dtype=dtype)
        slots.write(dense, part.masses(dtype)[..., :-1])
        lost = dense.masked_fill(~unmapped, 0.0).sum(-1, keepdim=True)
        share = 1 - lost
        heaviest = found.push(dense).topk(width, dim=-1)
        tokens.append(heaviest.indices.masked_fill(heaviest.values == 0, -1))  # an empty slot
        log_masses.append((heaviest.values / share.clamp(min=torch.finfo(dtype).tiny)).log())
        # A share that may be only rounding error is none.
        shares.append(share.squeeze(-1) > 4 * torch.finfo(dtype).eps)
    shape = stored.tokens.shape[:-1]
    has_mass = torch.cat(shares) if shares else flat.tokens.new_ones(0, dtype=torch.bool)
    made = TopKTeacher(
        (torch.cat(tokens) if tokens else flat.tokens.new_zeros(0, width)).reshape(*shape, width),
        (torch.cat(log_masses) if tokens else flat.log_masses.new_zeros(0, width))
        .to(stored.log_masses.dtype)
        .clamp(max=0.0)
        .reshape(*shape, width),
        students,
        stored.temperature,
    )
    return made, has_mass.reshape(shape) | stored.log_masses.isnan().all(-1)


def _blocks(rows: Tensor, counted: Tensor | None, width: int) -> Iterator[Tensor]:
    """Indices of the rows that count, so many at a time that a block is not too large."""
    elements = block_elements(rows.device, _BLOCK_ELEMENTS_ON_CPU, _BLOCK_ELEMENTS_ON_DEVICE)
    size = max(1, elements // width)
    places = torch.arange(len(rows), device=rows.device)
    if counted is not None:
        places = places[counted.reshape(-1)]
    yield from places.split(size) if len(places) else ()
