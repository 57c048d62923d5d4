"""Where in a text each token ends, in bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from otkd.alignment.encoding import Encoded, encode, refuse_changed
from otkd.scalars import as_whole

OUTSIDE = -1


@dataclass(frozen=True)
class TokenEnds:
    """The tokens of a text and where each ends.

    Attributes:
        ids: the token ids, with special tokens.
        ends: for each token, the number of bytes (UTF-8) of ``text`` up to its end. Special tokens
            before the text have 0. −1 marks tokens after the text or outside the span, and special
            tokens before a text whose beginning was truncated.
        text: the text, or the span of it.

    Example:
        >>> ends = otkd.alignment.TokenEnds(ids=(1, 8, 5), ends=(0, 3, 7), text="the cat")
        >>> otkd.alignment.common_positions(ends, [2, 3, 7]).student
        tensor([1, 2])
    """

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    text: str

    def __len__(self) -> int:
        return len(self.ids)


def token_ends(
    tokenizer: Any,
    text: str,
    *,
    span: tuple[int, int] | None = None,
    add_special_tokens: bool = True,
    max_length: int | None = None,
) -> TokenEnds:
    """Tokenise a text and find where each token ends, in bytes.

    Byte-level BPE and SentencePiece: the bytes of the tokens must add up to the text, except for a
    space that the tokenizer adds before a part of it. WordPiece: between two tokens there may be
    whitespace, which WordPiece ignores. A tokenizer that changes the text in another way is
    refused, because the other tokenizer would not see the same text.

    Args:
        tokenizer: a fast tokenizer of transformers.
        text: a text without lone surrogates.
        span: ``(start, stop)`` in characters: ends are counted from the start of this part of the
            text. It is how two chat templates share an answer; see
            :func:`~otkd.alignment.render_chat`.
        add_special_tokens: whether to add the tokenizer's special tokens. Use False for a rendered
            chat template, which already contains them.
        max_length: keep at most this many tokens, special tokens included, and cut those of the
            text on the tokenizer's ``truncation_side``.

    Raises:
        TypeError: for a slow tokenizer, or a text that is not a string.
        ValueError: if the tokenizer changes the text, the text holds a lone surrogate, or ``span``
            or ``max_length`` is out of range.

    Example:
        >>> import tokenizers, transformers
        >>> model = tokenizers.models.WordLevel({"un": 0, "do": 1, "é": 2}, "")
        >>> words = tokenizers.Tokenizer(model)
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
        >>> otkd.alignment.token_ends(tokenizer, "un é do").ends
        (2, 5, 8)
    """
    start, stop = _checked_span(span, text)
    encoded = encode(tokenizer, text, add_special_tokens=add_special_tokens)
    # Offset of each character, and of the end.
    at: Sequence[int] = range(len(text) + 1)
    if not text.isascii():
        at = [0, *itertools.accumulate(len(character.encode()) for character in text)]
    by_bytes = encoded.family in ("byte-level", "sentencepiece")
    follow = _ends_by_bytes if by_bytes else _ends_by_spans
    ends = follow(tokenizer, text, encoded, at)
    before = [0] * len(encoded.leading)
    if max_length is not None:
        encoded, ends, before = _truncated(tokenizer, encoded, ends, before, max_length)
    every = [*before, *ends, *[OUTSIDE] * len(encoded.trailing)]
    first, last = at[start], at[stop]
    return TokenEnds(
        ids=(*encoded.leading, *encoded.ids, *encoded.trailing),
        ends=tuple(end - first if first <= end <= last else OUTSIDE for end in every),
        text=text[start:stop],
    )


def _checked_span(span: tuple[int, int] | None, text: str) -> tuple[int, int]:
    if span is None:
        return 0, len(text) if isinstance(text, str) else 0
    start, stop = span
    if not 0 <= start <= stop <= len(text):
        raise ValueError(
            f"span must be (start, stop) with 0 ≤ start ≤ stop ≤ {len(text)}, the characters of "
            f"the text, got {span!r}"
        )
    return start, stop


def _ends_by_bytes(tokenizer: Any, text: str, encoded: Encoded, at: Sequence[int]) -> list[int]:
    """Sums of the tokens' bytes, checked against the text."""
    content = text.encode()
    ends: list[int] = []
    place = 0
    for known, group in itertools.groupby(range(len(encoded.ids)), lambda i: _is_known(encoded, i)):
        tokens = list(group)
        if not known:
            for i in tokens:
                if at[encoded.spans[i][0]] != place:
                    refuse_changed(tokenizer, text, _character(at, place), "")
                place = at[encoded.spans[i][1]]
                ends.append(place)
            continue
        pieces = [encoded.raw[i] or b"" for i in tokens]
        segment = b"".join(pieces)
        reached = place
        if not content.startswith(segment, place):
            if not (segment[:1] == b" " and content.startswith(segment[1:], place)):
                _refuse_segment(tokenizer, text, segment, content, place, at)
            reached -= 1  # the tokenizer has added a space
        for piece in pieces:
            reached += len(piece)
            ends.append(reached)
        place = reached
    if place != len(content):
        refuse_changed(tokenizer, text, _character(at, place), "")
    return ends


def _is_known(encoded: Encoded, token: int) -> bool:
    return encoded.raw[token] is not None


def _refuse_segment(
    tokenizer: Any, text: str, segment: bytes, content: bytes, place: int, at: Sequence[int]
) -> None:
    """Say where the tokens first differ from the text."""
    candidates = [segment, segment[1:]] if segment[:1] == b" " else [segment]
    common = [_common_length(each, content[place:]) for each in candidates]
    longest = max(range(len(common)), key=common.__getitem__)
    wrong = _character(at, place + common[longest])
    skipped = at[wrong] - place
    wrote = candidates[longest][skipped : skipped + 16].decode(errors="ignore")[:8]
    refuse_changed(tokenizer, text, wrong, wrote)


def _common_length(left: bytes, right: bytes) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _character(at: Sequence[int], place: int) -> int:
    """The character that contains this byte."""
    return max(i for i, offset in enumerate(at) if offset <= place)


def _ends_by_spans(tokenizer: Any, text: str, encoded: Encoded, at: Sequence[int]) -> list[int]:
    """Ends of the tokens' spans, whose text is checked; between them there is only whitespace."""
    reached = 0
    ends = []
    for raw, (start, stop) in zip(encoded.raw, encoded.spans, strict=True):
        if text[reached:start].strip():
            refuse_changed(tokenizer, text, reached, "")
        if raw is not None:
            word = raw.decode("utf-8", "surrogatepass")
            if text[start:stop] not in (word, word.removeprefix(" ")):
                refuse_changed(tokenizer, text, start, word.removeprefix(" "))
        reached = stop
        ends.append(at[stop])
    if text[reached:].strip():
        refuse_changed(tokenizer, text, reached, "")
    return ends


def _truncated(
    tokenizer: Any, encoded: Encoded, ends: list[int], before: list[int], max_length: int
) -> tuple[Encoded, list[int], list[int]]:
    kept = as_whole("max_length", max_length) - len(encoded.leading) - len(encoded.trailing)
    if kept < 0:
        raise ValueError(
            f"max_length={max_length} leaves no room beside the "
            f"{len(encoded.leading) + len(encoded.trailing)} special tokens"
        )
    cut = len(encoded.ids) - kept
    if cut <= 0:
        return encoded, ends, before
    left = getattr(tokenizer, "truncation_side", "right") == "left"
    part = slice(cut, None) if left else slice(kept)
    if left:  # what follows these tokens is not the beginning of the text
        before = [OUTSIDE] * len(before)
    return (
        replace(encoded, ids=encoded.ids[part], raw=encoded.raw[part], spans=encoded.spans[part]),
        ends[part],
        before,
    )
