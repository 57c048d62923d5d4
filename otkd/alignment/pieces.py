"""The bytes that each token of a tokenizer stands for, independent of how its family writes them.

Byte-level BPE writes a space as ``Ġ`` and every byte as one letter, SentencePiece writes a space as
``▁`` and a single byte as ``<0xE2>``, and WordPiece marks the continuation of a word with ``##``.
All are converted to the bytes of the text in UTF-8, with a space before the start of a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

# In this order: where one token has several roles it is the first of them.
ROLES = ("eos", "bos", "pad", "unk", "cls", "sep", "mask")

_PRINTABLE = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
LETTER_OF = {byte: letter for letter, byte in _BYTE_OF.items()}
_LONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@runtime_checkable
class Tokenizer(Protocol):
    """What a tokenizer must provide; those of transformers and of tokenizers do."""

    def get_vocab(self) -> dict[str, int]:
        """Every token, as the tokenizer writes it, with its id."""
        ...


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a tokenizer as bytes.

    Attributes:
        family: ``"byte-level"``, ``"sentencepiece"``, ``"wordpiece"``, or ``"plain"`` if no token
            has a marker, so that tokens are used as they are written. The marker that most tokens
            have decides.
        size: the largest id plus 1.
        raw: the bytes of every token without a role.
        ids: the token of each byte string; of several, the plainest.
        roles: the ids of special tokens by their role.
        added: the ids of tokens that were added to the vocabulary, and the special ones, which the
            tokenizer recognises before it splits the text.
        control: the ids of special tokens, with or without a role, which stand for no text.
    """

    family: str
    size: int
    raw: dict[int, bytes]
    ids: dict[bytes, int]
    roles: dict[str, int]
    added: frozenset[int]
    control: frozenset[int]


_known: WeakKeyDictionary[object, tuple[object, Vocabulary]] = WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer; read again only after it has changed.

    Raises:
        TypeError: if it has no ``get_vocab``.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"expected a tokenizer of transformers or tokenizers, with get_vocab(), got "
            f"{type(tokenizer).__name__}"
        )
    roles = _roles(tokenizer)
    state = (getattr(tokenizer, "__len__", lambda: None)(), tuple(roles.items()))
    if state[0] is None:  # nothing tells whether it has changed
        return _read(tokenizer, roles)
    kept = _known.get(tokenizer)
    if kept is None or kept[0] != state:
        kept = _known[tokenizer] = (state, _read(tokenizer, roles))
    return kept[1]


def as_text(raw: bytes) -> str:
    """The bytes as text; ``<0xE2>`` for each byte if they are a part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in raw)


def _roles(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    return {role: token for role, token in ids.items() if token is not None}


def _read(tokenizer: Tokenizer, roles: dict[str, int]) -> Vocabulary:
    every = tokenizer.get_vocab()
    special = set(roles.values())
    vocab = {piece: token for piece, token in every.items() if token not in special}
    # Added tokens are written as they are in every family.
    added = getattr(tokenizer, "get_added_vocab", dict)()
    family, read = _family([piece for piece in vocab if piece not in added])
    candidates = []
    for piece, token in vocab.items():
        raw, detour = _read_plain(piece) if piece in added else read(piece)
        candidates.append((detour, token, raw))
    ids: dict[bytes, int] = {}
    for _, token, raw in sorted(candidates):
        ids.setdefault(raw, token)
    control = special | set(getattr(tokenizer, "all_special_ids", ()))
    described = getattr(tokenizer, "added_tokens_decoder", {})
    control |= {token for token, entry in described.items() if getattr(entry, "special", False)}
    return Vocabulary(
        family=family,
        size=max(every.values(), default=-1) + 1,
        raw={token: raw for _, token, raw in candidates},
        ids=ids,
        roles=roles,
        added=frozenset(special | set(added.values())),
        control=frozenset(control),
    )


_Reader = Callable[[str], tuple[bytes, int]]


def _family(pieces: list[str]) -> tuple[str, _Reader]:
    """The name of this family of tokenizers, and the function that reads its tokens."""
    counts = Counter(
        marker for piece in pieces for marker in _FAMILIES if piece.startswith(marker)
    ).most_common(1)
    return _FAMILIES[counts[0][0]] if counts else ("plain", _read_plain)


def _read_plain(piece: str) -> tuple[bytes, int]:
    return piece.encode("utf-8", "surrogatepass"), 0


def _read_byte_level(piece: str) -> tuple[bytes, int]:
    if not all(letter in _BYTE_OF for letter in piece):
        return _read_plain(piece)
    return bytes(_BYTE_OF[letter] for letter in piece), 0


def _read_sentencepiece(piece: str) -> tuple[bytes, int]:
    if lone := _LONE_BYTE.fullmatch(piece):
        return bytes([int(lone[1], 16)]), 1
    return piece.replace("▁", " ").encode(), 0


def _read_wordpiece(piece: str) -> tuple[bytes, int]:
    if piece.startswith("##") and len(piece) > 2:
        return piece[2:].encode(), 1
    return (piece if stands_alone(piece) else f" {piece}").encode(), 0


def stands_alone(piece: str) -> bool:
    """Whether WordPiece splits this character off everywhere."""
    if len(piece) != 1:
        return False
    if piece.isascii():
        return not piece.isalnum()
    name = unicodedata.name(piece, "")
    return unicodedata.category(piece).startswith("P") or name.startswith("CJK ")


_FAMILIES: dict[str, tuple[str, _Reader]] = {
    "Ġ": ("byte-level", _read_byte_level),
    "▁": ("sentencepiece", _read_sentencepiece),
    "##": ("wordpiece", _read_wordpiece),
}
