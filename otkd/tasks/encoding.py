"""Tokenisation of a task's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenise the columns ``text`` and ``text_pair``, with truncation and without padding.

    The collator pads each batch to its longest row. ``length`` lets the trainer put rows of similar
    length into one batch.

    Returns:
        The tokenizer's columns, ``labels`` and ``length``.
    """

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length
        )
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {**encoded, "labels": batch["label"], "length": lengths}

    return dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)
