"""Batches for a teacher with its own tokenizer: its inputs, and the common positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from otkd.alignment.encoding import check_fast
from otkd.alignment.examples import AlignedExample, align_example
from otkd.integrations.packing import PACKED_KEY, packed_lengths
from otkd.teachers import DenseTeacher, HiddenStateTeacher, TopKTeacher

ALIGNED_KEY = "aligned"
_NO_PLACE = -1


class Aligner:
    """Adds to a batch what a teacher with its own tokenizer needs.

    This is a dictionary under the key ``aligned``: the places of the common positions in the
    student's and in the teacher's rows, ``student`` and ``teacher`` ``(rows, places)``, and the
    ``inputs`` of the teacher.

    Args:
        student_tokenizer: a fast tokenizer of transformers.
        teacher_tokenizer: likewise.

    Raises:
        TypeError: for a slow tokenizer.
    """

    def __init__(self, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
        self._tokenizers = student_tokenizer, teacher_tokenizer
        for tokenizer in self._tokenizers:
            check_fast(tokenizer)

    def examples(self, features: Sequence[dict[str, Any]]) -> list[AlignedExample]:
        """The examples of a batch; ``features`` become those of the student alone."""
        return [align_example(feature, *self._tokenizers) for feature in features]

    def entry(
        self,
        examples: Sequence[AlignedExample],
        batch: Mapping[str, Any],
        inner: Callable[[list], Any],
    ) -> dict[str, Any]:
        """The entry ``aligned`` of a batch.

        Args:
            examples: from :meth:`examples`.
            batch: what ``inner`` made of the student's features.
            inner: the collator; if it packs the student's tokens, it also packs the teacher's.

        Raises:
            ValueError: if the batch does not contain the student's tokens as they are, or has none.
        """
        if not any(len(example.ids) for example in examples):
            raise ValueError("all texts of a batch are empty: remove empty texts")
        filler = self._tokenizers[1].pad_token_id or 0
        # A model cannot read rows without tokens, as of a character that the student does not end.
        ids = [list(example.teacher_ids) or [filler] for example in examples]
        if PACKED_KEY in batch:
            inputs = _packed_inputs(ids, inner)
            starts = [_row_starts(each[PACKED_KEY]) for each in (batch, inputs)]
            join = _in_one_row
        else:
            inputs = _padded_inputs(ids, filler)
            starts = [_paddings(batch, examples), [0] * len(examples)]
            join = _in_rows
        shifted = [
            example.positions.shifted(student=ours, teacher=theirs)
            for example, ours, theirs in zip(examples, *starts, strict=True)
        ]
        return {
            "student": join([positions.student for positions in shifted]),
            "teacher": join([positions.teacher for positions in shifted]),
            "inputs": inputs,
        }


def at_common_positions(stored: Any, examples: Sequence[AlignedExample], *, packed: bool) -> Any:
    """A stored teacher ``(examples, positions, …)`` at the common positions of each example.

    Args:
        stored: with one entry for each token of the teacher, from the first on.
        examples: from :meth:`Aligner.examples`.
        packed: whether the examples are one row.

    Returns:
        ``(examples, places, …)``, or ``(1, places, …)`` of all examples.

    Raises:
        ValueError: if the teacher has no positions, or too few.
    """
    if not isinstance(stored, Tensor | TopKTeacher | DenseTeacher | HiddenStateTeacher):
        stored = DenseTeacher(stored.logits(), getattr(stored, "features", None))
    shape = (stored.values if isinstance(stored, DenseTeacher) else stored).shape
    needed = max((int(example.positions.teacher[-1:].sum()) for example in examples), default=0)
    if len(shape) != 3 or shape[1] <= needed:
        raise ValueError(
            f"the stored teacher of this batch has the shape {tuple(shape)}, but the texts have at "
            f"least {needed + 1} tokens of the teacher: store (examples, positions, vocab) over "
            "the teacher's own tokens, from the first token on"
        )
    places = [example.positions.teacher for example in examples]
    if packed:
        rows = [torch.full_like(place, row) for row, place in enumerate(places)]
        return stored[_in_one_row(rows), _in_one_row(places)]
    return stored[torch.arange(len(places)).unsqueeze(1), _in_rows(places).clamp(min=0)]


def _padded_inputs(ids: Sequence[list[int]], filler: int) -> dict[str, Tensor]:
    rows = [torch.tensor(each) for each in ids]
    return {
        "input_ids": _in_rows(rows, filler),
        "attention_mask": _in_rows([torch.ones_like(row) for row in rows], 0),
    }


def _packed_inputs(ids: Sequence[list[int]], inner: Callable[[list], Any]) -> dict[str, Any]:
    found = inner([{"input_ids": each} for each in ids])
    lengths = packed_lengths(ids, found)
    if lengths is None:
        raise ValueError(
            "the collator packs the student's tokens into one row, but not the teacher's: use "
            "DataCollatorWithFlattening, or pad the examples"
        )
    return {**{name: x for name, x in found.items() if name != "labels"}, PACKED_KEY: lengths}


def _row_starts(lengths: Tensor) -> list[int]:
    return (lengths.cumsum(0) - lengths).tolist()


def _paddings(batch: Mapping[str, Any], examples: Sequence[AlignedExample]) -> list[int]:
    """The number of tokens that the collator has put before each example."""
    rows, mask = batch["input_ids"], batch.get("attention_mask")
    starts = [0] * len(examples)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        first = (mask != 0).int().argmax(1).tolist()
        starts = [max(n - e.padding, 0) for n, e in zip(first, examples, strict=False)]
    kept = len(rows) == len(examples) and all(
        row[start : start + len(example.ids)].tolist() == list(example.ids)
        for row, start, example in zip(rows, starts, examples, strict=True)
    )
    if not kept:
        raise ValueError(
            "with a teacher_tokenizer, the collator must put the input_ids of each example into a "
            "row as they are, but it cuts, changes or joins them: use "
            "otkd.tasks.causal_lm.padding_collator or DataCollatorWithFlattening"
        )
    return starts


def _in_rows(values: Sequence[Tensor], filler: int = _NO_PLACE) -> Tensor:
    return pad_sequence(list(values), batch_first=True, padding_value=filler)


def _in_one_row(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)).unsqueeze(0)
