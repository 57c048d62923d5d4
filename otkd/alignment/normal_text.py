"""Texts that several tokenizers read without changing them."""

from __future__ import annotations

import itertools
from typing import Any

from otkd.alignment.encoding import Encoded, encode
from otkd.alignment.ends import token_ends

_ROUNDS = 8


def normalized_for(text: str, *tokenizers: Any) -> str:
    """The text as all of the tokenizers read it: lower-cased, in one Unicode form, and so on.

    The tokenizers normalise the text in turn until none of them changes it. Whitespace that
    WordPiece ignores is kept. A text that no tokenizer changes is returned as it is.

    Args:
        text: a text without lone surrogates.
        tokenizers: fast tokenizers of transformers.

    Raises:
        TypeError: for a slow tokenizer, or a text that is not a string.
        ValueError: if the text holds a lone surrogate, or the tokenizers disagree, so that there is
            no such text.

    Example:
        >>> import tokenizers, transformers
        >>> model = tokenizers.models.WordPiece({"[UNK]": 0, "un": 1, "##do": 2})
        >>> words = tokenizers.Tokenizer(model)
        >>> words.normalizer = tokenizers.normalizers.Lowercase()
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
        >>> otkd.alignment.normalized_for("Undo", tokenizer)
        'undo'
    """
    for _ in range(_ROUNDS):
        before = text
        for tokenizer in tokenizers:
            text = _as_read(tokenizer, text)
        if text == before:
            break
    for tokenizer in tokenizers:
        token_ends(tokenizer, text, add_special_tokens=False)  # raises what it cannot read
    return text


def _as_read(tokenizer: Any, text: str) -> str:
    """The text that the tokens of ``text`` stand for."""
    encoded = encode(tokenizer, text, add_special_tokens=False)
    if encoded.family in ("byte-level", "sentencepiece"):
        return _joined_bytes(text, encoded)
    normalizer = tokenizer.backend_tokenizer.normalizer
    parts: list[str] = []
    reached = 0
    for raw, (start, stop) in zip(encoded.raw, encoded.spans, strict=True):
        parts += filter(str.isspace, text[reached:start])
        word = text[start:stop]
        if raw is not None:
            read = raw.decode("utf-8", "surrogatepass")
            word = read if read == word else read.removeprefix(" ")
        elif normalizer is not None:  # an unknown word
            word = normalizer.normalize_str(word).strip() or word
        parts.append(word)
        reached = max(reached, stop)
    parts += filter(str.isspace, text[reached:])
    return "".join(parts)


def _joined_bytes(text: str, encoded: Encoded) -> str:
    parts: list[str] = []
    places = range(len(encoded.ids))
    for known, group in itertools.groupby(places, lambda i: encoded.raw[i] is not None):
        tokens = list(group)
        if not known:
            parts += (text[slice(*encoded.spans[i])] for i in tokens)
            continue
        segment = b"".join(encoded.raw[i] or b"" for i in tokens).decode(errors="replace")
        start = encoded.spans[tokens[0]][0]
        # A space that is not in the text was added by the tokenizer.
        is_added = segment.startswith(" ") and not text[start : start + 1].isspace()
        if is_added and not (start and text[start - 1].isspace()):
            segment = segment[1:]
        parts.append(segment)
    return "".join(parts)
