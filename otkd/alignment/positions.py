"""Positions at which two tokenisations of one text have read the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from otkd.alignment.ends import TokenEnds, token_ends


@dataclass(frozen=True, eq=False)
class AlignedPositions:
    """Positions of two models that have read the same bytes.

    At each, both models predict what follows: the logits *at* these tokens are what a loss
    compares.

        loss(student_logits[row, found.student], teacher_logits[row, found.teacher])

    Attributes:
        offsets: number of bytes of the text that both have read, ascending.
        student: index of the student's token that ends there.
        teacher: index of the teacher's token that ends there.

    Example:
        >>> found = otkd.alignment.common_positions([0, 3, 5, 9], [0, 5, 7, 9, -1])
        >>> found.offsets, found.student, found.teacher
        (tensor([0, 5, 9]), tensor([0, 2, 3]), tensor([0, 1, 3]))
    """

    offsets: Int[Tensor, " positions"]
    student: Int[Tensor, " positions"]
    teacher: Int[Tensor, " positions"]

    def __len__(self) -> int:
        return len(self.offsets)

    def shifted(self, *, student: int = 0, teacher: int = 0) -> AlignedPositions:
        """The positions in rows that have this many tokens before those of the text.

        These are padding tokens on the left or, in packed rows, the tokens of other documents.

        Example:
            >>> otkd.alignment.common_positions([1, 2], [1, 2]).shifted(student=7).student
            tensor([7, 8])
        """
        return AlignedPositions(self.offsets, self.student + student, self.teacher + teacher)

    @classmethod
    def cat(cls, documents: Sequence[AlignedPositions]) -> AlignedPositions:
        """The positions of several documents, one after the other, already :meth:`shifted`.

        ``offsets`` are those of each document.
        """
        none = [torch.zeros(0, dtype=torch.long)]
        offsets, student, teacher = (
            torch.cat([getattr(each, name) for each in documents] or none)
            for name in ("offsets", "student", "teacher")
        )
        return cls(offsets, student, teacher)


def common_positions(
    student_ends: TokenEnds | Sequence[int], teacher_ends: TokenEnds | Sequence[int]
) -> AlignedPositions:
    """The byte offsets at which tokens of both end, and these tokens.

    Of several tokens with the same end, the last one is the position: of special tokens before the
    text it is the last one. Negative ends are no positions.

    Args:
        student_ends: from :func:`~otkd.alignment.token_ends`, or its ``ends``.
        teacher_ends: likewise, of the same text.

    Raises:
        ValueError: if both have a text and it is not the same, or ends are not ascending.
    """
    texts = [each.text for each in (student_ends, teacher_ends) if isinstance(each, TokenEnds)]
    if len(texts) == 2 and texts[0] != texts[1]:
        raise ValueError(
            f"student and teacher must read the same text, got {texts[0][:40]!r} and "
            f"{texts[1][:40]!r}"
        )
    of_student, student = _last_tokens("student_ends", student_ends)
    of_teacher, teacher = _last_tokens("teacher_ends", teacher_ends)
    offsets, i, j = np.intersect1d(of_student, of_teacher, assume_unique=True, return_indices=True)
    return AlignedPositions(*(torch.from_numpy(each) for each in (offsets, student[i], teacher[j])))


def align_positions(
    text: str,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    add_special_tokens: bool = True,
    max_length: int | None = None,
) -> AlignedPositions:
    """The positions at which both tokenisations of a text have a boundary between two tokens.

    It works for byte-level BPE, SentencePiece and WordPiece. At offset 0 the position is the last
    special token before the text, if both tokenizers have one. At the end of the text it is the
    last token of the text, not a special token after it. Boundaries inside a character, between two
    of its bytes, are positions, too. An unknown token of WordPiece or SentencePiece is a token like
    all others.

    For more control, such as two chat templates or different lengths, pass the result of two calls
    of :func:`~otkd.alignment.token_ends` to :func:`common_positions`.

    Args:
        text: a text without lone surrogates.
        student_tokenizer: a fast tokenizer of transformers.
        teacher_tokenizer: likewise.
        add_special_tokens: see :func:`~otkd.alignment.token_ends`.
        max_length: see :func:`~otkd.alignment.token_ends`; of both.

    Raises:
        TypeError, ValueError: as :func:`~otkd.alignment.token_ends`.

    Example:
        >>> import tokenizers, transformers
        >>> def characters(size):
        ...     backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"abcdef": 0}, "?"))
        ...     pattern = tokenizers.Regex("." * size)
        ...     backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
        ...     backend.add_tokens([f"{i:0{size}}" for i in range(10**size)])
        ...     return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
        >>> otkd.alignment.align_positions("000000", characters(2), characters(3)).offsets
        tensor([6])
    """
    options = {"add_special_tokens": add_special_tokens, "max_length": max_length}
    return common_positions(
        token_ends(student_tokenizer, text, **options),
        token_ends(teacher_tokenizer, text, **options),
    )


def _last_tokens(name: str, ends: TokenEnds | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ends, ascending, and the last token that has each."""
    found = np.asarray(ends.ends if isinstance(ends, TokenEnds) else ends, dtype=np.int64)
    tokens = np.flatnonzero(found >= 0)
    found = found[tokens]
    if (np.diff(found) < 0).any():
        raise ValueError(
            f"{name} must be ascending, apart from negative entries, got a token that ends before "
            "the one in front of it"
        )
    last = np.flatnonzero(np.append(np.diff(found) > 0, [True] * bool(len(found))))
    return found[last], tokens[last]
