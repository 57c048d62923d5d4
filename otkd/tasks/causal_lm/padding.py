"""A collator for rows of tokens that differ in length."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from otkd.checks import check_choice

if TYPE_CHECKING:
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase


def padding_collator(
    tokenizer: PreTrainedTokenizerBase, side: str = "right"
) -> DataCollatorForSeq2Seq:
    """A collator that pads a batch to its longest row, and labels with −100.

    Args:
        tokenizer: needs a padding token. It is copied, so that its own side stays as it is.
        side: ``"right"`` for training, ``"left"`` for generation.

    Raises:
        ValueError: for another side, or a tokenizer without a padding token.
    """
    from transformers import DataCollatorForSeq2Seq

    check_choice("side", side, ("left", "right"))
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token"
        )
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer)
