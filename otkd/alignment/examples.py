"""An example for two tokenizers: its tokens in both, and their common positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from otkd.alignment.ends import TokenEnds, token_ends
from otkd.alignment.given_tokens import ends_of_ids
from otkd.alignment.pieces import vocabulary_of
from otkd.alignment.positions import AlignedPositions, common_positions
from otkd.reductions import IGNORE_INDEX

TEXT_COLUMNS = ("text", "teacher_input_ids", "teacher_labels")
_NO_LIMIT = 10**9  # what tokenizers have as their largest length if there is none is larger


@dataclass(frozen=True)
class AlignedExample:
    """An example in the tokens of both tokenizers.

    Attributes:
        ids: the student's tokens.
        padding: how many of them are padding in front.
        teacher_ids: the teacher's tokens.
        positions: where both have read the same bytes.
    """

    ids: Sequence[int]
    padding: int
    teacher_ids: Sequence[int]
    positions: AlignedPositions


def align_example(
    feature: dict[str, Any], student_tokenizer: Any, teacher_tokenizer: Any
) -> AlignedExample:
    """Align an example, and make it one of the student alone.

    An example has ``input_ids``, or a ``text`` that both tokenizers read. If it has
    ``teacher_input_ids``, the positions are those of the tokens with labels, each stretch of them
    counted from its start; otherwise the teacher reads the text of the ``input_ids``.

    Args:
        feature: the example; the entries that the student does not read are removed.
        student_tokenizer: a fast tokenizer of transformers.
        teacher_tokenizer: likewise.

    Raises:
        ValueError: for an example with neither text nor tokens; for a text that a tokenizer
            changes; for a special token inside it that the teacher does not have; if the tokens
            with labels are different texts.
    """
    text, theirs, their_labels = (feature.pop(name, None) for name in TEXT_COLUMNS)
    ours = None
    if feature.get("input_ids") is None:
        if not isinstance(text, str):
            raise ValueError(
                "with a teacher_tokenizer, an example needs input_ids or a text, got "
                f"{', '.join(feature) or 'neither'}"
            )
        ours = _read(student_tokenizer, text)
        feature |= {"input_ids": [*ours.ids], "attention_mask": [1] * len(ours)}
    ids = [int(token) for token in feature["input_ids"]]
    read = [bool(each) for each in feature.get("attention_mask", ())]
    padding = read.index(True) if any(read) else 0
    if theirs is None:
        if ours is None:
            ours = ends_of_ids(student_tokenizer, ids)
            _refuse_unknown_special(student_tokenizer, teacher_tokenizer, ours)
        ends = _read(teacher_tokenizer, ours.text)
        return AlignedExample(ids, padding, ends.ids, common_positions(ours, ends))
    theirs = [int(token) for token in theirs]
    stretches = [
        _stretches(student_tokenizer, ids, feature.get("labels")),
        _stretches(teacher_tokenizer, theirs, their_labels),
    ]
    if len(stretches[0]) != len(stretches[1]):
        raise ValueError(
            "the tokens with labels must be the same texts for student and teacher, but they are "
            f"{len(stretches[0])} stretches for the student and {len(stretches[1])} for the teacher"
        )
    found = [_common(*pair) for pair in zip(*stretches, strict=True)]
    return AlignedExample(ids, padding, theirs, AlignedPositions.cat(found))


def _read(tokenizer: Any, text: str) -> TokenEnds:
    limit = tokenizer.model_max_length
    return token_ends(tokenizer, text, max_length=limit if limit < _NO_LIMIT else None)


def _refuse_unknown_special(student: Any, teacher: Any, ours: TokenEnds) -> None:
    """Raise for a special token inside the text that the teacher would read as plain text."""
    control, known = vocabulary_of(student).control, teacher.get_added_vocab()
    inside = {token for token, end in zip(ours.ids, ours.ends, strict=True) if end > 0}
    for piece in student.convert_ids_to_tokens(sorted(inside & control)):
        if piece not in known:
            raise ValueError(
                f"the input_ids contain {piece!r}, which the teacher's tokenizer does not have, so "
                "the teacher cannot read them: give each example teacher_input_ids and "
                "teacher_labels, written with the teacher's chat template"
            )


def _stretches(
    tokenizer: Any, ids: list[int], labels: Sequence[int] | None
) -> list[tuple[TokenEnds, int]]:
    """The stretches of tokens with labels, each with the token in front of it, and its place."""
    if labels is None:
        return [(ends_of_ids(tokenizer, ids), 0)]
    if len(labels) != len(ids):
        raise ValueError(f"got {len(labels)} labels for {len(ids)} tokens")
    found = []
    for counts, group in groupby(range(len(ids)), lambda i: int(labels[i]) != IGNORE_INDEX):
        if not counts:
            continue
        places = list(group)
        start, stop = places[0], places[-1] + 1
        part, front = ends_of_ids(tokenizer, ids[start:stop]), min(start, 1)
        ends = (*[0] * front, *part.ends)
        found.append((TokenEnds(tuple(ids[start - front : stop]), ends, part.text), start - front))
    return found


def _common(ours: tuple[TokenEnds, int], theirs: tuple[TokenEnds, int]) -> AlignedPositions:
    """The common positions of a stretch, one of which may be cut or have a space in front."""
    sides = [_without_space(ours[0], theirs[0]), _without_space(theirs[0], ours[0])]
    shorter, longer = sorted((side.text for side in sides), key=len)
    if not longer.startswith(shorter):
        raise ValueError(
            "the tokens with labels must be the same text for student and teacher, got "
            f"{sides[0].text[:60]!r} and {sides[1].text[:60]!r}"
        )
    found = common_positions(*(side.ends for side in sides))
    return found.shifted(student=ours[1], teacher=theirs[1])


def _without_space(one: TokenEnds, other: TokenEnds) -> TokenEnds:
    if one.text[:1] != " " or other.text[:1] == " ":
        return one
    ends = tuple(end - 1 if end > 0 else end for end in one.ends)
    return TokenEnds(one.ids, ends, one.text[1:])
