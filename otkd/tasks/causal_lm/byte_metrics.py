"""Metrics that do not depend on the tokenizer: bits per byte, and the next byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from otkd.alignment.examples import AlignedExample, align_example
from otkd.alignment.pieces import vocabulary_of
from otkd.functional import kl_divergence
from otkd.reductions import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NO_BYTE = 256  # the class of special tokens, which stand for no text


@dataclass(frozen=True)
class ByteMetrics:
    """How well a student and its teacher predict the same bytes; see :func:`byte_metrics`.

    Attributes:
        student_bits_per_byte: −log₂ of the probability that the student gives the bytes, per byte.
        teacher_bits_per_byte: the same of the teacher.
        first_byte_kl: KL(p‖q) in nats of the distributions of the next byte, averaged over the
            common positions.
        bytes: how many bytes both have predicted.
        positions: how many common positions there are.
    """

    student_bits_per_byte: float
    teacher_bits_per_byte: float
    first_byte_kl: float
    bytes: int
    positions: int


def byte_metrics(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
) -> ByteMetrics:
    """Compare two causal language models, with one tokenizer or two, on the same bytes.

    Bits per byte are those of the bytes between the first and the last common position of each
    text, or of each answer, so that both models predict the same bytes. A model whose tokenizer
    puts no special token in front does not predict the first token.

    The probability of a byte is the sum over all tokens that begin with it, and of special tokens
    as one class. WordPiece does not write whitespace: a token that begins a word begins with a
    space.

    Args:
        student: a causal language model.
        teacher: likewise.
        student_tokenizer: a fast tokenizer of transformers.
        teacher_tokenizer: likewise; it may be the same.
        examples: as ``DistillationTrainer`` takes them with a ``teacher_tokenizer``. Positions
            count where the student's next token has a label, or everywhere without labels.
        batch_size: examples of a forward pass.

    Raises:
        ValueError: if the examples have no common position with a token behind it, or cannot be
            aligned.
    """
    tokenizers = student_tokenizer, teacher_tokenizer
    every = [_aligned(example, *tokenizers) for example in examples]
    rows = [(row, kept) for row, kept in every if len(kept)]
    nats = [0.0, 0.0]
    divergence, count, size = 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        predicted = zip(
            _log_probs(student, [row.ids for row, _ in part]),
            _log_probs(teacher, [row.teacher_ids for row, _ in part]),
            strict=True,
        )
        for (row, kept), pair in zip(part, predicted, strict=True):
            found = row.positions
            steps = found.offsets.diff()
            used = kept[:-1] & (steps > 0)  # the next answer counts from 0
            size += int(steps[used].sum())
            count += int(kept.sum())
            sides = ((row.ids, found.student), (row.teacher_ids, found.teacher))
            of_bytes = []
            for side, (ids, places) in enumerate(sides):
                nats[side] -= _between(pair[side], ids, places)[used].sum().item()
                of_bytes.append(_first_bytes(pair[side][places[kept]], tokenizers[side]))
            divergence += kl_divergence(*of_bytes).sum().item()
    if not size:
        raise ValueError(
            "the examples have no two common positions with a token of the student between them "
            "that has a label"
        )
    ours, theirs = (value / math.log(2) / size for value in nats)
    return ByteMetrics(ours, theirs, divergence / count, size, count)


def _aligned(example: Mapping[str, Any], *tokenizers: Any) -> tuple[AlignedExample, Tensor]:
    """The example, and whether the student's token after each common position has a label."""
    feature = dict(example)
    row = align_example(feature, *tokenizers)
    labels = feature.get("labels")
    counts = torch.ones(len(row.ids), dtype=torch.bool)
    if labels is not None:
        counts = torch.as_tensor(labels) != IGNORE_INDEX
    following = torch.cat([counts[1:], torch.zeros(1, dtype=torch.bool)])
    return row, following[row.positions.student]


@torch.no_grad()
def _log_probs(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities of the next token after each token of each row, on the CPU."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    training = model.training
    model.eval()
    try:
        logits = model(
            input_ids=pad_sequence(ids, batch_first=True).to(model.device),
            attention_mask=mask.to(model.device),
        ).logits
    finally:
        model.train(training)
    values = logits.float().log_softmax(-1).cpu()
    return [found[: len(row)] for found, row in zip(values, ids, strict=True)]


def _between(log_probs: Tensor, ids: Sequence[int], places: Tensor) -> Tensor:
    """Log-probabilities of the tokens after each place, up to the next one."""
    following = torch.tensor(ids[1:], dtype=torch.long).unsqueeze(-1)
    of_tokens = log_probs[:-1].gather(1, following).squeeze(-1).double()
    sums = torch.cat([of_tokens.new_zeros(1), of_tokens.cumsum(0)])
    return sums[places].diff()


def _first_bytes(log_probs: Tensor, tokenizer: Any) -> Tensor:
    """Log-probabilities of the next byte, and of all special tokens, ``(rows, 257)``."""
    vocabulary = vocabulary_of(tokenizer)
    classes = torch.full((log_probs.shape[-1],), _NO_BYTE)
    for token, raw in vocabulary.raw.items():
        if raw and token not in vocabulary.control:
            classes[token] = raw[0]
    masses = log_probs.new_zeros(len(log_probs), _NO_BYTE + 1, dtype=torch.float64)
    return masses.index_add_(1, classes, log_probs.double().exp()).log()
