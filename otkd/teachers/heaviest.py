"""The most probable tokens of dense teacher logits."""

from __future__ import annotations

import torch
from torch import Tensor

from otkd.checks import check_one_logits, check_positive
from otkd.precision import compute_dtype

_BLOCK_ELEMENTS = 2**24


def heaviest_of_logits(
    teacher_logits: Tensor, k: int, temperature: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The tokens and log-masses, ``(*batch, k)``; see :meth:`otkd.TopKTeacher.from_logits`."""
    check_one_logits("teacher_logits", teacher_logits)
    check_positive(temperature=temperature)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    vocab = teacher_logits.shape[-1]
    precision = compute_dtype(teacher_logits)
    rows = teacher_logits.detach().reshape(-1, vocab)
    tokens = rows.new_empty(len(rows), min(k, vocab), dtype=torch.int32)
    log_masses = torch.empty_like(tokens, dtype=dtype or precision)
    block_rows = max(1, _BLOCK_ELEMENTS // vocab)
    for block in torch.arange(len(rows), device=rows.device).split(block_rows):
        logits = rows[block].to(precision) / temperature
        heaviest, chosen = logits.topk(tokens.shape[-1])
        tokens[block] = chosen.to(tokens.dtype)
        normaliser = logits.logsumexp(-1, keepdim=True)
        log_masses[block] = (heaviest - normaliser).to(log_masses.dtype)
    shape = (*teacher_logits.shape[:-1], tokens.shape[-1])
    return tokens.reshape(shape), log_masses.reshape(shape)
