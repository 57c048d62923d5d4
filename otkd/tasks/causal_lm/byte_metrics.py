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
            common positions; infinite if the teacher finds a byte possible with which no token of
            the student begins.
        same_first_byte: share of the common positions where both find the same next byte most
            probable.
        bytes: how many bytes both have predicted.
        positions: how many common positions there are.
    """

    student_bits_per_byte: float
    teacher_bits_per_byte: float
    first_byte_kl: float
    same_first_byte: float
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
    puts no special token in front does not predict the first token. An unknown token has its own
    probability, not that of the characters that it stands for, so that a tokenizer that does not
    know all characters has too few bits.

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
    comparison = ByteComparison(*tokenizers)
    every = [_aligned(example, *tokenizers) for example in examples]
    rows = [(row, counted) for row, counted in every if len(row.positions)]
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ours = next_log_probs(student, [row.ids for row, _ in part])
        theirs = next_log_probs(teacher, [row.teacher_ids for row, _ in part])
        for (row, counted), *pair in zip(part, ours, theirs, strict=True):
            comparison.add(row, *pair, counted=counted)
    return comparison.metrics()


class ByteComparison:
    """The sums behind :func:`byte_metrics`, to which one example after another is added."""

    def __init__(self, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
        self._first = _FirstBytes(student_tokenizer), _FirstBytes(teacher_tokenizer)
        self._nats = [0.0, 0.0]
        self._divergence = 0.0
        self._same = self._positions = self._bytes = 0

    def add(
        self,
        row: AlignedExample,
        student: Tensor,
        teacher: Tensor,
        *,
        counted: Tensor | None = None,
    ) -> None:
        """Add an example.

        Args:
            row: from :func:`~otkd.alignment.examples.align_example`.
            student: its log-probabilities of the token after each of ``row.ids``.
            teacher: likewise, after each of ``row.teacher_ids``.
            counted: whether each of the student's tokens is predicted; by default all but the
                first are.
        """
        found = row.positions
        following = torch.ones(len(row.ids), dtype=torch.bool)
        following[-1:] = False
        if counted is not None:
            following[:-1] = counted[1:]
        kept, steps = following[found.student], found.offsets.diff()
        used = kept[:-1] & (steps > 0)  # the next answer counts from 0
        self._bytes += int(steps[used].sum())
        self._positions += int(kept.sum())
        of_bytes = []
        sides = (student, row.ids, found.student), (teacher, row.teacher_ids, found.teacher)
        for side, (log_probs, ids, places) in enumerate(sides):
            self._nats[side] -= _between(log_probs, ids, places)[used].sum().item()
            of_bytes.append(self._first[side](log_probs[places[kept]]))
        ours, theirs = of_bytes
        # Not otkd's divergence, which bounds the logarithm of a mass of 0.
        terms = theirs.exp() * (theirs - ours)
        self._divergence += terms.masked_fill(theirs == -torch.inf, 0.0).sum().item()
        self._same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())

    def metrics(self) -> ByteMetrics:
        """The metrics over all examples.

        Raises:
            ValueError: if no byte of them was predicted.
        """
        if not self._bytes:
            raise ValueError(
                "the examples have no two common positions with a token of the student between "
                "them that has a label"
            )
        ours, theirs = (value / math.log(2) / self._bytes for value in self._nats)
        return ByteMetrics(
            student_bits_per_byte=ours,
            teacher_bits_per_byte=theirs,
            first_byte_kl=self._divergence / self._positions,
            same_first_byte=self._same / self._positions,
            bytes=self._bytes,
            positions=self._positions,
        )


def _aligned(example: Mapping[str, Any], *tokenizers: Any) -> tuple[AlignedExample, Tensor | None]:
    """The example, and whether each of the student's tokens has a label; None if all have."""
    feature = dict(example)
    row = align_example(feature, *tokenizers)
    labels = feature.get("labels")
    return row, None if labels is None else torch.as_tensor(labels) != IGNORE_INDEX


@torch.no_grad()
def next_log_probs(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities of the next token after each token of each row, on the CPU.

    Args:
        model: a causal language model.
        rows: ids of tokens.

    Returns:
        ``(tokens, vocab)`` for each row.
    """
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


class _FirstBytes:
    """Log-probabilities of the next byte, and of all special tokens, ``(rows, 257)``."""

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self._bytes = {
            token: raw[0]
            for token, raw in vocabulary.raw.items()
            if raw and token not in vocabulary.control
        }
        self._classes = torch.empty(0, dtype=torch.long)

    def __call__(self, log_probs: Tensor) -> Tensor:
        size = log_probs.shape[-1]
        if len(self._classes) != size:  # logits may be padded
            self._classes = torch.tensor(
                [self._bytes.get(token, _NO_BYTE) for token in range(size)]
            )
        masses = log_probs.new_zeros(len(log_probs), _NO_BYTE + 1, dtype=torch.float64)
        return masses.index_add_(1, self._classes, log_probs.double().exp()).log()
