"""The first token with which a tokenizer writes given bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from otkd.alignment.pieces import LETTER_OF, Vocabulary

NOTHING = -1


def first_tokens(tokenizer: Any, vocabulary: Vocabulary, every: Iterable[bytes]) -> list[int]:
    """The first token of the tokenisation of each byte string; −1 where there is none.

    The model of the tokenizer is asked directly, so that nothing is added in front, and so that
    byte-level BPE also tokenises parts of a character. WordPiece and plain vocabularies take the
    longest token, as WordPiece does, after the tokenizer's normaliser. An unknown token is none.
    """
    if vocabulary.family == "byte-level":
        first = _byte_level(tokenizer, vocabulary)
    elif vocabulary.family == "sentencepiece":
        first = _sentencepiece(tokenizer, vocabulary)
    else:
        first = _longest(tokenizer, vocabulary)
    return [first(raw) for raw in every]


def _byte_level(tokenizer: Any, vocabulary: Vocabulary) -> Callable[[bytes], int]:
    model, unknown = tokenizer.backend_tokenizer.model, vocabulary.roles.get("unk")

    def first(raw: bytes) -> int:
        return _id(model.tokenize("".join(LETTER_OF[byte] for byte in raw)), unknown)

    return first


def _sentencepiece(tokenizer: Any, vocabulary: Vocabulary) -> Callable[[bytes], int]:
    model, unknown = tokenizer.backend_tokenizer.model, vocabulary.roles.get("unk")

    def first(raw: bytes) -> int:
        try:
            text = raw.decode()
        except UnicodeDecodeError:  # a part of a character is written byte by byte
            return vocabulary.ids.get(raw[:1], NOTHING)
        return _id(model.tokenize(text.replace(" ", "▁")), unknown)

    return first


def _id(tokens: list[Any], unknown: int | None) -> int:
    return tokens[0].id if tokens and tokens[0].id != unknown else NOTHING


def _longest(tokenizer: Any, vocabulary: Vocabulary) -> Callable[[bytes], int]:
    normalizer, known = tokenizer.backend_tokenizer.normalizer, vocabulary.ids
    longest = max(map(len, known), default=0)

    def first(raw: bytes) -> int:
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return NOTHING
        starts_word = text[:1].isspace()
        text = (text if normalizer is None else normalizer.normalize_str(text)).strip()
        # Punctuation stands alone, so that it has no space in front.
        for candidate in (f" {text}", text) if starts_word else (text,):
            written = candidate.encode()
            for stop in range(min(len(written), longest), 0, -1):
                if (token := known.get(written[:stop])) is not None:
                    return token
        return NOTHING

    return first
