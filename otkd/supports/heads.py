"""The tokens of a position that carry most of its mass, and that mass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otkd.supports.base import Positions, check_softmax

_BLOCK_ELEMENTS_ON_CPU = 2**19  # about what a core's cache holds
_BLOCK_ELEMENTS_ON_DEVICE = 2**26


class Heads(NamedTuple):
    """Tokens of N positions.

    Attributes:
        tokens: ``(N, K)``; the first ``counts`` of each row are distinct, the others repeat one.
        counts: ``(N,)``.
        normaliser: log-sum-exp of all logits over the temperature, ``(N,)``.
    """

    tokens: Tensor
    counts: Tensor
    normaliser: Tensor

    @property
    def valid(self) -> Tensor:
        """Where a token is not a repetition, ``(N, K)``."""
        places = torch.arange(self.tokens.shape[-1], device=self.tokens.device)
        return places < self.counts.unsqueeze(-1)


def block_size(vocab: int, device: torch.device) -> int:
    """How many rows of logits are worked on at a time."""
    elements = _BLOCK_ELEMENTS_ON_CPU if device.type == "cpu" else _BLOCK_ELEMENTS_ON_DEVICE
    return max(1, elements // vocab)


@torch.no_grad()
def select_heads(positions: Positions, k: int, *, shared: bool) -> tuple[Heads, Heads]:
    """The k heaviest tokens of student and teacher, or of both the union of the two.

    Raises:
        ValueError: if a row of logits has no softmax.
    """
    size = block_size(positions.student.shape[-1], positions.student.device)
    blocks = [
        (_heaviest(positions.student_block(rows), k), _heaviest(positions.teacher_block(rows), k))
        for rows in positions.blocks(size)
    ]
    (q_tokens, q_normaliser), (p_tokens, p_normaliser) = (
        tuple(torch.cat(parts) for parts in zip(*side, strict=True))
        for side in zip(*blocks, strict=True)
    )
    check_softmax("student_logits", q_normaliser)
    check_softmax("teacher_logits", p_normaliser)
    if not shared:
        return _distinct(q_tokens, q_normaliser), _distinct(p_tokens, p_normaliser)
    union, counts = _union(q_tokens, p_tokens)
    return Heads(union, counts, q_normaliser), Heads(union, counts, p_normaliser)


def _heaviest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    heaviest, tokens = logits.topk(min(k, logits.shape[-1]), sorted=False)
    top = heaviest.amax(-1, keepdim=True)
    return tokens, (logits - top).exp_().sum(-1).log_() + top.squeeze(-1)


def _distinct(tokens: Tensor, normaliser: Tensor) -> Heads:
    return Heads(tokens, torch.full_like(tokens[:, 0], tokens.shape[-1]), normaliser)


def _union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct tokens of both, foremost, and their number."""
    tokens = torch.cat([first, second], -1).sort(-1).values
    repeated = torch.zeros_like(tokens, dtype=torch.bool)
    repeated[:, 1:] = tokens[:, 1:] == tokens[:, :-1]
    order = repeated.to(torch.uint8).sort(dim=-1, stable=True).indices
    return tokens.gather(-1, order), tokens.shape[-1] - repeated.sum(-1)


class HeadMasses(torch.autograd.Function):
    """Masses of the head and, last, of all other tokens, ``(N, K + 1)``.

    Its gradient in the logits z is q_i·(G_i − ⟨q, G⟩)/T with G the gradient in the mass of the atom
    that token i belongs to. It is written a block of positions at a time, beside which nothing as
    large as the logits is held.
    """

    @staticmethod
    def forward(ctx, logits, counted, heads, temperature, dtype):  # noqa: D102
        if counted is None:
            gathered = logits.gather(-1, heads.tokens)
        else:
            gathered = logits[counted.unsqueeze(-1), heads.tokens]
        log_masses = gathered.to(dtype) / temperature - heads.normaliser.unsqueeze(-1)
        masses = log_masses.exp_().masked_fill_(~heads.valid, 0)
        rest = (1 - masses.sum(-1, keepdim=True)).clamp_(min=0)
        rest.masked_fill_((heads.counts == logits.shape[-1]).unsqueeze(-1), 0)
        ctx.save_for_backward(logits, counted, heads.tokens, heads.normaliser, masses, rest)
        ctx.temperature = temperature
        return torch.cat([masses, rest], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_masses):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, counted, tokens, normaliser, masses, rest = ctx.saved_tensors
        grad_head, grad_rest = grad_masses[:, :-1], grad_masses[:, -1:]
        inner = (masses * grad_head).sum(-1, keepdim=True) + rest * grad_rest
        of_rest = (grad_rest - inner) / ctx.temperature
        correction = masses * (grad_head - grad_rest) / ctx.temperature
        grad = torch.empty_like(logits) if counted is None else torch.zeros_like(logits)
        size = block_size(logits.shape[-1], logits.device)
        for start in range(0, len(tokens), size):
            block = slice(start, start + size)
            rows = block if counted is None else counted[block]
            scaled = logits[rows].to(masses.dtype) / ctx.temperature
            q = scaled.sub_(normaliser[block].unsqueeze(-1)).exp_()
            q.mul_(of_rest[block]).scatter_add_(-1, tokens[block], correction[block])
            grad[rows] = q.to(grad.dtype)
        return grad, None, None, None, None
