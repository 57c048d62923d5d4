"""The tokens that two tokenizers share, independent of how each writes them.

Byte-level BPE writes a space as ``Ġ`` and every byte as one letter, SentencePiece writes a space as
``▁`` and a single byte as ``<0xE2>``, and WordPiece marks the continuation of a word with ``##``.
All are converted to the text that they stand for, with a space before the start of a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

# In this order: where one token has several roles it is the first of them.
ROLES = ("eos", "bos", "pad", "unk", "cls", "sep", "mask")

_PRINTABLE = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
_LONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@runtime_checkable
class Tokenizer(Protocol):
    """What a tokenizer must provide; those of transformers and of tokenizers do."""

    def get_vocab(self) -> dict[str, int]:
        """Every token, as the tokenizer writes it, with its id."""
        ...


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
    sides = (student_tokenizer, teacher_tokenizer)
    roles = [_roles(tokenizer) for tokenizer in sides]
    texts = [
        _texts(tokenizer, set(special.values()))
        for tokenizer, special in zip(sides, roles, strict=True)
    ]
    found = [(token, texts[1][text], text) for text, token in texts[0].items() if text in texts[1]]
    taken: tuple[set[int], set[int]] = (set(), set())
    for role in (role for role in roles[0] if role in roles[1]):
        student, teacher = roles[0][role], roles[1][role]
        if student not in taken[0] and teacher not in taken[1]:
            found.append((student, teacher, f"<{role}>"))
            taken[0].add(student)
            taken[1].add(teacher)
    found.sort()
    student, teacher = (
        torch.tensor([row[side] for row in found], dtype=torch.long) for side in (0, 1)
    )
    return SharedTokens(tuple(row[2] for row in found), student, teacher)


def _roles(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    return {role: token for role, token in ids.items() if token is not None}


def _texts(tokenizer: Tokenizer, special: set[int]) -> dict[str, int]:
    """The text of every token, and its id; of several tokens with one text, the plainest."""
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"expected a tokenizer of transformers or tokenizers, with get_vocab(), got "
            f"{type(tokenizer).__name__}"
        )
    vocab = {piece: token for piece, token in tokenizer.get_vocab().items() if token not in special}
    added = getattr(tokenizer, "get_added_vocab", dict)()  # written as they are in every family
    read = _reader([piece for piece in vocab if piece not in added])
    candidates = []
    for piece, token in vocab.items():
        text, detour = (piece, 0) if piece in added else read(piece)
        candidates.append((detour, token, text))
    texts: dict[str, int] = {}
    for _, token, text in sorted(candidates):
        texts.setdefault(text, token)
    return texts


def _reader(pieces: list[str]) -> Callable[[str], tuple[str, int]]:
    """The function that reads tokens of this family of tokenizers."""
    counts = Counter(
        marker for piece in pieces for marker in _READERS if piece.startswith(marker)
    ).most_common(1)
    return _READERS[counts[0][0]] if counts else lambda piece: (piece, 0)


def _read_byte_level(piece: str) -> tuple[str, int]:
    if not all(letter in _BYTE_OF for letter in piece):
        return piece, 0
    raw = bytes(_BYTE_OF[letter] for letter in piece)
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:  # a part of a character
        return "".join(f"<0x{byte:02X}>" for byte in raw), 0


def _read_sentencepiece(piece: str) -> tuple[str, int]:
    lone = _LONE_BYTE.fullmatch(piece)
    if lone and int(lone[1], 16) < 128:
        return chr(int(lone[1], 16)), 1
    return piece.replace("▁", " "), 0


def _read_wordpiece(piece: str) -> tuple[str, int]:
    if piece.startswith("##") and len(piece) > 2:
        return piece[2:], 1
    return (piece if _stands_alone(piece) else f" {piece}"), 0


def _stands_alone(piece: str) -> bool:
    """Whether WordPiece splits this character off everywhere."""
    if len(piece) != 1:
        return False
    if piece.isascii():
        return not piece.isalnum()
    name = unicodedata.name(piece, "")
    return unicodedata.category(piece).startswith("P") or name.startswith("CJK ")


_READERS = {"Ġ": _read_byte_level, "▁": _read_sentencepiece, "##": _read_wordpiece}
