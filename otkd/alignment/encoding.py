"""One text as the tokens of a fast tokenizer, with the part of the text that each stands for."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from otkd.alignment.pieces import vocabulary_of


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text.

    Attributes:
        family: of the tokenizer; see :class:`~otkd.alignment.pieces.Vocabulary`.
        leading: ids of the special tokens that the tokenizer put before the text.
        ids: ids of the tokens of the text.
        raw: the bytes of each of them; None for added tokens, which may include the whitespace
            around them, and for the unknown token.
        spans: of each, where it begins and ends in the text, in characters. They are exact for
            tokens without bytes. In byte-level BPE others may be trimmed, and tokens that are
            parts of one character share its span.
        trailing: ids of the special tokens after the text.
    """

    family: str
    leading: tuple[int, ...]
    ids: tuple[int, ...]
    raw: tuple[bytes | None, ...]
    spans: tuple[tuple[int, int], ...]
    trailing: tuple[int, ...]


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> Encoded:
    """Tokenise a text.

    Raises:
        TypeError: if it is not a fast tokenizer of transformers, or ``text`` is not a string.
        ValueError: if the text holds a lone surrogate.
    """
    check_fast(tokenizer)
    check_text(text)
    vocabulary = vocabulary_of(tokenizer)
    found = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    ids, special = found["input_ids"], found["special_tokens_mask"]
    of_text = [place for place, is_special in enumerate(special) if not is_special]
    # Without text, the first special token is what stands before it.
    first = of_text[0] if of_text else min(1, len(ids))
    last = of_text[-1] + 1 if of_text else first
    raw = vocabulary.raw
    return Encoded(
        family=vocabulary.family,
        leading=tuple(ids[:first]),
        ids=tuple(ids[first:last]),
        raw=tuple(
            None if token in vocabulary.added else raw.get(token) for token in ids[first:last]
        ),
        spans=tuple(tuple(span) for span in found["offset_mapping"][first:last]),
        trailing=tuple(ids[last:]),
    )


def check_fast(tokenizer: Any) -> None:
    """Raise ``TypeError`` unless it is a fast tokenizer of transformers."""
    name = type(tokenizer).__name__
    if not hasattr(tokenizer, "is_fast"):
        wrapped = (
            ". Wrap it: transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)"
            if type(tokenizer).__module__.partition(".")[0] == "tokenizers"
            else ""
        )
        raise TypeError(f"positions need a fast tokenizer of transformers, got {name}{wrapped}")
    if not tokenizer.is_fast:
        # The fast class of a slow one has the same name with another end.
        stem = name.removesuffix("Legacy").removesuffix("Fast")
        library: Any = sys.modules.get("transformers")
        names = [f"{stem}Fast", stem, "PreTrainedTokenizerFast"]
        fast = next((each for each in names if each != name and hasattr(library, each)), names[-1])
        raise TypeError(
            f"{name} is a slow tokenizer, which does not say where its tokens are in the text: "
            f"use {fast}, for example transformers.{fast}.from_pretrained(…), or convert it with "
            "transformers.convert_slow_tokenizer"
        )


def check_text(text: str) -> None:
    """Raise unless ``text`` is a string that can be written in UTF-8."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is the lone surrogate "
            f"{text[error.start]!a}, which has no bytes in UTF-8: read the text with "
            "errors='replace', or remove it"
        ) from None


def refuse_changed(tokenizer: Any, text: str, place: int, wrote: str) -> None:
    """Raise ``ValueError``: the tokens do not give back the text from character ``place`` on."""
    raise ValueError(
        f"{type(tokenizer).__name__} changes the text: at character {place} it reads {wrote!r} in "
        f"place of {text[place : place + max(8, len(wrote))]!r}. It normalises texts (case, "
        "accents, Unicode form or whitespace), so that positions in them are not those in the "
        "other tokenizer's text. Pass both the text "
        "otkd.alignment.normalized_for(text, student_tokenizer, teacher_tokenizer)"
    )
