"""The text that given tokens stand for, and where each of them ends in it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from otkd.alignment.encoding import check_fast
from otkd.alignment.ends import OUTSIDE, TokenEnds, token_ends
from otkd.alignment.pieces import Vocabulary, vocabulary_of


def ends_of_ids(tokenizer: Any, ids: Sequence[int]) -> TokenEnds:
    """The text of given tokens, and where each of them ends in it, in bytes.

    It is :func:`~otkd.alignment.token_ends` for tokens that already exist, also if they are not
    what the tokenizer would make of the text, as when a prompt and its answer were tokenised
    separately.

    Special tokens at the end are after the text. Those at the start are before it, unless there are
    more of them inside the text, as in a chat: then only those that the tokenizer itself puts in
    front. Special tokens inside the text have the bytes of their names. From the first unknown
    token on, or the first byte that is not UTF-8, nothing is known of the text, and tokens have no
    end.

    Args:
        tokenizer: a fast tokenizer of transformers.
        ids: tokens, with or without special ones; without padding.

    Raises:
        TypeError: for a slow tokenizer.
        ValueError: for ids that are no tokens; for WordPiece and other tokenizers that do not write
            whitespace, if the tokens are not those of a text.

    Example:
        >>> import tokenizers, transformers
        >>> backend = tokenizers.Tokenizer(tokenizers.models.BPE({"Ġ": 0, "un": 1, "do": 2}, []))
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
        >>> found = otkd.alignment.ends_of_ids(tokenizer, [1, 2, 0, 2])
        >>> found.text, found.ends
        ('undo do', (2, 4, 5, 7))
    """
    check_fast(tokenizer)
    ids, vocabulary = tuple(int(token) for token in ids), vocabulary_of(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    if None in pieces:
        wrong = ids[pieces.index(None)]
        raise ValueError(f"{wrong} is no token of the {type(tokenizer).__name__}")
    first, last = _text_part(tokenizer, vocabulary, ids)
    inside = range(first, last)
    if vocabulary.family in ("byte-level", "sentencepiece"):
        ends, text = _by_bytes(tokenizer, vocabulary, ids, [pieces[i] for i in inside], first)
    else:
        text = tokenizer.decode(ids[first:last], clean_up_tokenization_spaces=False)
        found = token_ends(tokenizer, text, add_special_tokens=False)
        if found.ids != ids[first:last]:
            raise ValueError(
                f"{type(tokenizer).__name__} does not write whitespace, and would tokenise "
                f"{text[:40]!r} otherwise than it is in the tokens: give the texts instead"
            )
        ends = list(found.ends)
    return TokenEnds(ids, (*[0] * first, *ends, *[OUTSIDE] * (len(ids) - last)), text)


def _text_part(tokenizer: Any, vocabulary: Vocabulary, ids: tuple[int, ...]) -> tuple[int, int]:
    """The places of the first token of the text, and after the last one."""
    of_text = [i for i, token in enumerate(ids) if not _is_control(vocabulary, token)]
    if not of_text:
        return len(ids[:1]), len(ids[:1])
    first, last = of_text[0], of_text[-1] + 1
    if len(of_text) < last - first:  # special tokens inside
        own = tuple(tokenizer("a").input_ids)
        while ids[:first] != own[:first]:
            first -= 1
    unknown = vocabulary.roles.get("unk")
    return first, ids.index(unknown) if unknown in ids[first:last] else last


def _is_control(vocabulary: Vocabulary, token: int) -> bool:
    # An unknown token stands for text.
    return token in vocabulary.control and token != vocabulary.roles.get("unk")


def _by_bytes(
    tokenizer: Any, vocabulary: Vocabulary, ids: tuple[int, ...], pieces: list[str], first: int
) -> tuple[list[int], str]:
    written: list[bytes] = []
    before = ""  # the special token in front
    for token, piece in zip(ids[first:], pieces, strict=False):
        control = _is_control(vocabulary, token)
        raw = vocabulary.raw.get(token)
        raw = piece.encode() if control or raw is None else raw
        starts = not written or before
        if starts and not control and raw[:1] == b" " and _adds_space(tokenizer, before):
            raw = raw[1:]
        written.append(raw)
        before = piece if control else ""
    whole = b"".join(written)
    try:
        text = whole.decode()
    except UnicodeDecodeError as error:
        text = whole[: error.start].decode()
    size = len(text.encode())
    return [end if end <= size else OUTSIDE for end in accumulate(map(len, written))], text


def _adds_space(tokenizer: Any, before: str) -> bool:
    """Whether the tokenizer adds a space to a text, or to what follows a special token."""
    ids = tokenizer(f"{before}a", add_special_tokens=False).input_ids
    raw, size = vocabulary_of(tokenizer).raw, 1 if before else 0
    return b"".join(raw.get(token, b"") for token in ids[size:])[:1] == b" "
