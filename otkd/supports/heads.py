"""The most probable tokens of a position, and their masses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otkd.costs import Cost
from otkd.costs.counterparts import nearest_sources
from otkd.precision import without_autocast
from otkd.supports.base import Positions, check_softmax, over_temperature
from otkd.teachers.beside import certainly_heavier
from otkd.tensors import block_elements, refuse_batched

_BLOCK_ELEMENTS_ON_CPU = 2**19  # about what a core's cache holds
_BLOCK_ELEMENTS_ON_DEVICE = 2**26
_GROUP = 8
_SMALL_REST = 1e-3


class Heads(NamedTuple):
    """Tokens of N positions.

    Attributes:
        tokens: ``(N, K)``; the first ``counts`` of each row are distinct, the others are
            repetitions.
        counts: ``(N,)``.
        normaliser: log-sum-exp of all logits divided by the temperature, ``(N,)``.
    """

    tokens: Tensor
    counts: Tensor
    normaliser: Tensor

    @property
    def valid(self) -> Tensor:
        """Whether a token is not a repetition, ``(N, K)``."""
        return not_repeated(self.tokens, self.counts)


class Atoms(NamedTuple):
    """The atoms of one side: single tokens, then atoms that stand for all other tokens.

    Attributes:
        heads: the single tokens.
        log_masses: ``(N, K + others)``; −∞ for repetitions.
    """

    heads: Heads
    log_masses: Tensor

    @property
    def width(self) -> int:
        """Number of columns for single tokens, K."""
        return self.heads.tokens.shape[-1]

    def others(self) -> Tensor:
        """Total mass of all other tokens, ``(N,)``; detached."""
        return self.log_masses.detach()[:, self.width :].exp().sum(-1)

    def without_others(self, *, normalize: bool) -> Atoms:
        """Only the single tokens, with their mass or, with ``normalize``, with total mass 1."""
        log_masses = self.log_masses[:, : self.width]
        return Atoms(self.heads, log_masses.log_softmax(-1) if normalize else log_masses)

    def part(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and log masses of some positions, without columns of repetitions alone."""
        count = int(self.heads.counts[places].max())
        return self.heads.tokens[places, :count], self.columns(self.log_masses, places, count)

    def columns(self, values: Tensor, places: Tensor, count: int) -> Tensor:
        """Of values of all atoms, those of ``count`` tokens and the others at some positions."""
        values = values[places]
        return torch.cat([values[:, :count], values[:, self.width :]], -1)


def block_size(vocab: int, device: torch.device) -> int:
    """The number of rows of logits in a block."""
    elements = block_elements(device, _BLOCK_ELEMENTS_ON_CPU, _BLOCK_ELEMENTS_ON_DEVICE)
    return max(1, elements // vocab)


@torch.no_grad()
def select_heads(positions: Positions, k: int, cost: Cost) -> tuple[Heads, Heads]:
    """The k most probable tokens of student and teacher; over one vocabulary the union of both.

    Between two vocabularies, the student also has the token that is nearest to each of the
    teacher's. Otherwise a token that the teacher wants and the student finds improbable would be
    part of the tail, where no gradient distinguishes it from all others.

    For a stored teacher, these are the stored tokens. The mass of its other tokens is known only as
    a total, so the student adds only tokens that are certainly more probable than in the teacher.
    Otherwise the loss would not be 0 at student = teacher.

    Raises:
        ValueError: if a row of logits has no softmax.
    """
    shared = cost.one_vocabulary
    size = block_size(positions.student.shape[-1], positions.student.device)
    blocks = [
        _heaviest_of_both(positions, rows, k, shared=shared) for rows in positions.blocks(size)
    ]
    q_tokens, q_normaliser, p_tokens, p_normaliser = (
        torch.cat(parts) for parts in zip(*blocks, strict=True)
    )
    check_softmax("student_logits", q_normaliser)
    check_softmax("teacher_logits", p_normaliser)
    if shared:
        union, counts = union_of(q_tokens, p_tokens)
        student, teacher = Heads(union, counts, q_normaliser), Heads(union, counts, p_normaliser)
    else:
        sizes = positions.student.shape[-1], positions.teacher.shape[-1]
        counterparts = nearest_sources(cost, p_tokens, sizes, positions.dtype)
        student = Heads(*union_of(q_tokens, counterparts), q_normaliser)
        # Empty slots repeat stored tokens.
        teacher = (
            _distinct(p_tokens, p_normaliser)
            if positions.stored is None
            else Heads(*union_of(p_tokens, p_tokens[:, :0]), p_normaliser)
        )
    return student, teacher


def _heaviest_of_both(
    positions: Positions, rows: slice | Tensor, k: int, *, shared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and normalisers of the student and of the teacher, ``(rows, k)`` and ``(rows,)``."""
    logits = positions.student_block(rows)
    q_tokens, q_normaliser = _heaviest(logits, k)
    if positions.stored is None:
        return q_tokens, q_normaliser, *_heaviest(positions.teacher_block(rows), k)
    stored = positions.stored[rows]
    p_tokens = stored.slots.tokens
    if shared:
        log_q = logits.gather(-1, q_tokens) - q_normaliser.unsqueeze(-1)
        # A stored token replaces those that may be as probable in the teacher.
        q_tokens = q_tokens.where(certainly_heavier(log_q, stored), p_tokens[:, :1])
    # Stored masses are normalised; their sum is only checked.
    return q_tokens, q_normaliser, p_tokens, stored.masses(positions.dtype).sum(-1)


def _heaviest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    tokens = top_tokens(logits, k)
    top, place = logits.gather(-1, tokens).max(-1)
    # One fused pass; the difference is exact where the log-probability is small.
    log_q = torch.log_softmax(logits, -1)
    best = tokens.gather(-1, place.unsqueeze(-1))
    return tokens, top - log_q.gather(-1, best).squeeze(-1)


def top_tokens(logits: Tensor, k: int) -> Tensor:
    """The k largest entries of each row (all if there are fewer), unsorted, ``(N, k)``.

    They lie in the k groups with the largest maxima. Computing maxima is much faster than
    selecting, so the groups are selected in the same way, and then their members.
    """
    vocab = logits.shape[-1]
    groups = vocab // _GROUP
    if groups < 2 * k:
        return logits.topk(min(k, vocab), sorted=False).indices
    grouped = logits[:, : groups * _GROUP].unflatten(-1, (_GROUP, groups))
    chosen = top_tokens(grouped.amax(-2), k)
    members = torch.arange(_GROUP, device=logits.device).mul_(groups)
    candidates = (chosen.unsqueeze(-2) + members.unsqueeze(-1)).flatten(-2)
    rest = torch.arange(groups * _GROUP, vocab, device=logits.device)
    candidates = torch.cat([candidates, rest.expand(len(logits), -1)], -1)
    return candidates.gather(-1, logits.gather(-1, candidates).topk(k, sorted=False).indices)


def _distinct(tokens: Tensor, normaliser: Tensor) -> Heads:
    return Heads(tokens, torch.full_like(tokens[:, 0], tokens.shape[-1]), normaliser)


def union_of(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct tokens of both sides, first in each row, and their number, ``(N,)``."""
    tokens = torch.cat([first, second], -1).sort(-1).values
    repeated = torch.zeros_like(tokens, dtype=torch.bool)
    repeated[:, 1:] = tokens[:, 1:] == tokens[:, :-1]
    order = repeated.to(torch.uint8).sort(dim=-1, stable=True).indices
    return tokens.gather(-1, order), tokens.shape[-1] - repeated.sum(-1)


def not_repeated(tokens: Tensor, counts: Tensor) -> Tensor:
    """True for the first ``counts`` tokens of each row, ``(N, K)``; see :func:`union_of`."""
    return torch.arange(tokens.shape[-1], device=tokens.device) < counts.unsqueeze(-1)


class HeadLogMasses(torch.autograd.Function):
    """Log masses of the head and, last, of the atoms of all other tokens, ``(N, K + atoms)``.

    There is one such atom, or one per cluster of the vocabulary. Let G be the gradient in the log
    masses, and c the atom of token i, of mass q_c. The gradient in the logits z is
    (G_c·q_i/q_c − q_i·Σ G)/T, with q_i = q_c for a token of the head. It is written in blocks of
    positions, so that no other tensor is as large as the logits.
    """

    @staticmethod
    def forward(ctx, logits, counted, heads, clusters, temperature, dtype):  # noqa: D102
        if counted is None:
            gathered = logits.gather(-1, heads.tokens)
        else:
            gathered = logits[counted.unsqueeze(-1), heads.tokens]
        log_masses = gathered.to(dtype) / temperature - heads.normaliser.unsqueeze(-1)
        log_masses.masked_fill_(~heads.valid, -torch.inf)
        masses = log_masses.exp()
        if clusters is None:
            rest = 1 - masses.sum(-1, keepdim=True)
            # The rounding error of the sum is as large as a small rest: add up its tokens there.
            small = (rest.squeeze(-1) < _SMALL_REST).nonzero().squeeze(-1)
            rows = small if counted is None else counted[small]
            parts = _blocks_of(logits, rows, temperature, dtype)
            for _, block, q in parts if len(small) else ():
                places = small[block]
                rest[places] = q.scatter_(-1, heads.tokens[places], 0).sum(-1, keepdim=True)
        else:
            membership = clusters.membership(dtype)
            blocks = _blocks_of(logits, counted, temperature, dtype)
            with without_autocast(logits):
                rest = torch.cat(
                    [q.scatter_(-1, heads.tokens[block], 0) @ membership for _, block, q in blocks]
                )
        ctx.save_for_backward(logits, counted, heads.tokens, masses, rest)
        ctx.clusters, ctx.temperature = clusters, temperature
        return torch.cat([log_masses, rest.log()], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logs):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_batched("TopK", grad_logs)
        logits, counted, tokens, masses, rest = ctx.saved_tensors
        total = grad_logs.sum(-1, keepdim=True)
        grad_head, grad_rest = grad_logs.split([tokens.shape[-1], rest.shape[-1]], -1)
        of_head = (grad_head - masses * total) / ctx.temperature
        of_rest = torch.where(rest > 0, grad_rest / rest, 0).sub_(total).div_(ctx.temperature)
        grad = torch.empty_like(logits) if counted is None else torch.zeros_like(logits)
        for rows, block, q in _blocks_of(logits, counted, ctx.temperature, masses.dtype):
            every = of_rest[block]
            if ctx.clusters is not None:
                every = every.index_select(-1, ctx.clusters.assignment)
            q.scatter_(-1, tokens[block], 0).mul_(every)
            q.scatter_add_(-1, tokens[block], of_head[block])
            # Rounded last, because small entries would underflow in float16 before they are scaled.
            grad[rows] = q.to(grad.dtype)
        return grad, None, None, None, None, None


def _blocks_of(logits: Tensor, counted: Tensor | None, temperature: float, dtype: torch.dtype):
    """Rows of the logits, their indices among the counted ones, and their distributions."""
    size = block_size(logits.shape[-1], logits.device)
    for start in range(0, len(logits) if counted is None else len(counted), size):
        block = slice(start, start + size)
        rows = block if counted is None else counted[block]
        yield rows, block, torch.softmax(over_temperature(logits[rows], temperature, dtype), -1)
