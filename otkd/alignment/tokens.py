"""The tokens that two tokenizers share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from otkd.alignment.pieces import Tokenizer, as_text, vocabulary_of


@dataclass(frozen=True, eq=False)
class SharedTokens:
    """Tokens that two vocabularies share.

    Attributes:
        strings: the text of each token, with a space before the start of a word; for a special
            token its role, such as ``"<eos>"``.
        student: their ids in the student's vocabulary, ascending and distinct.
        teacher: their ids in the teacher's vocabulary, distinct.

    Example:
        >>> class Words:
        ...     def __init__(self, *words):
        ...         self.words = words
        ...     def get_vocab(self):
        ...         return {word: token for token, word in enumerate(self.words)}
        >>> shared = otkd.alignment.shared_tokens(Words("a", "b", "c"), Words("c", "d", "a"))
        >>> shared.strings, shared.student.tolist(), shared.teacher.tolist()
        (('a', 'c'), [0, 2], [2, 0])
    """

    strings: tuple[str, ...]
    student: Int[Tensor, " tokens"]
    teacher: Int[Tensor, " tokens"]

    def __len__(self) -> int:
        return len(self.strings)


def shared_tokens(student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> SharedTokens:
    """The tokens that stand for the same text in both vocabularies.

    ``Ġthe``, ``▁the`` and WordPiece's ``the`` are all " the", and ``the``, ``the`` and ``##the``
    are "the". WordPiece splits off punctuation and Chinese characters everywhere, so these have no
    space in front. Special tokens are matched by their role (eos, bos, pad, unk, cls, sep, mask) if
    both tokenizers have it, and never by their text. Case and accents are significant, so a
    tokenizer that removes them shares only lower-case tokens without accents.

    The marker that most tokens have decides how a tokenizer is read. If no token has a marker,
    tokens are used as they are written.

    Raises:
        TypeError: if either has no ``get_vocab``.
    """
    one, other = vocabulary_of(student_tokenizer), vocabulary_of(teacher_tokenizer)
    found = [
        (token, other.ids[raw], as_text(raw)) for raw, token in one.ids.items() if raw in other.ids
    ]
    taken: tuple[set[int], set[int]] = (set(), set())
    for role in (role for role in one.roles if role in other.roles):
        student, teacher = one.roles[role], other.roles[role]
        if student not in taken[0] and teacher not in taken[1]:
            found.append((student, teacher, f"<{role}>"))
            taken[0].add(student)
            taken[1].add(teacher)
    found.sort()
    student, teacher = (
        torch.tensor([row[side] for row in found], dtype=torch.long) for side in (0, 1)
    )
    return SharedTokens(tuple(row[2] for row in found), student, teacher)
