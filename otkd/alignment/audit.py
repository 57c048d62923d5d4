"""How well two tokenizers correspond on given texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from otkd.alignment.ends import TokenEnds, token_ends
from otkd.alignment.matching import token_map
from otkd.alignment.pieces import as_text, vocabulary_of
from otkd.alignment.positions import common_positions
from otkd.alignment.token_map import EXACT, NOTHING, TokenMap

EXACT_MATCH, FIRST_TOKEN, EMBEDDING, NO_MATCH = COVERAGE = (
    "exact match",
    "first token",
    "embedding only",
    "nothing",
)


@dataclass(frozen=True)
class WorstToken:
    """A frequent token of the teacher without an exact match.

    Attributes:
        token: its id.
        text: what it stands for.
        share: of the occurrences of all of the teacher's tokens.
        coverage: what connects it to the student's tokens; one of :attr:`Audit.coverage`.
        student: the token of the student that its bytes begin with, or None.

    Example:
        >>> otkd.alignment.WorstToken(5, "the", 0.02, "first token", "t").share
        0.02
    """

    token: int
    text: str
    share: float
    coverage: str
    student: str | None


@dataclass(frozen=True)
class Audit:
    """How well two tokenizers correspond on given texts; from :func:`audit`.

    Attributes:
        texts: number of texts.
        tokens: number of tokens of their text, ``{"student": …, "teacher": …}``.
        boundaries: number of positions at which both have a boundary.
        boundary_share: this number over that of all boundaries of each side.
        coverage: share of the occurrences of the teacher's tokens by what connects them to the
            student's: ``"exact match"`` (the same bytes, or the same role), ``"first token"`` (one
            begins with the other), ``"embedding only"`` (the student cannot write them, so that
            only a cost between embeddings does), or ``"nothing"`` (special tokens without a
            counterpart).
        vocabulary: the same shares of the tokens of the teacher's vocabulary.
        worst: the most frequent tokens without an exact match.

    Example:
        >>> shares = {"exact match": 1.0}
        >>> tokens = {"student": 4, "teacher": 3}
        >>> found = otkd.alignment.Audit(1, tokens, 3, {"student": 0.75}, shares, shares, ())
        >>> found.as_dict()["boundaries"]
        3
    """

    texts: int
    tokens: dict[str, int]
    boundaries: int
    boundary_share: dict[str, float]
    coverage: dict[str, float]
    vocabulary: dict[str, float]
    worst: tuple[WorstToken, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, as for JSON."""
        return {**asdict(self), "worst": [asdict(token) for token in self.worst]}


def audit(
    student_tokenizer: Any, teacher_tokenizer: Any, texts: Iterable[str], *, worst: int = 20
) -> Audit:
    """Measure on texts how well two tokenizers correspond.

    Args:
        student_tokenizer: a fast tokenizer of transformers.
        teacher_tokenizer: likewise.
        texts: texts that neither tokenizer changes; see :func:`~otkd.alignment.normalized_for`.
        worst: how many tokens to list.

    Raises:
        TypeError: for a slow tokenizer.
        ValueError: if there is no text, or a tokenizer changes one.
    """
    count, boundaries = 0, 0
    tokens = {"student": 0, "teacher": 0}
    occurrences: Counter[int] = Counter()
    for text in texts:
        student, teacher = (
            token_ends(tokenizer, text, add_special_tokens=False)
            for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        count += 1
        boundaries += len(common_positions(student, teacher))
        tokens["student"] += _boundaries(student)
        tokens["teacher"] += _boundaries(teacher)
        occurrences.update(teacher.ids)
    if not boundaries:
        raise ValueError("an audit needs a text with at least one token")
    found = token_map(student_tokenizer, teacher_tokenizer)
    control = vocabulary_of(teacher_tokenizer).control
    every = range(found.vocab_size[1])
    by_token = {token: _coverage(found, token, control) for token in every}
    return Audit(
        texts=count,
        tokens=tokens,
        boundaries=boundaries,
        boundary_share={side: boundaries / number for side, number in tokens.items()},
        coverage=_shares(by_token, occurrences),
        vocabulary=_shares(by_token, Counter(every)),
        worst=tuple(_worst(found, by_token, occurrences, student_tokenizer, teacher_tokenizer))[
            :worst
        ],
    )


def _boundaries(ends: TokenEnds) -> int:
    return len({end for end in ends.ends if end >= 0})


def _coverage(found: TokenMap, token: int, control: frozenset[int]) -> str:
    kind = int(found.kinds[token])
    if kind == NOTHING:
        return NO_MATCH if token in control else EMBEDDING
    return EXACT_MATCH if kind >= EXACT else FIRST_TOKEN


def _shares(by_token: dict[int, str], occurrences: Counter[int]) -> dict[str, float]:
    counts: dict[str, int] = dict.fromkeys(COVERAGE, 0)
    for token, number in occurrences.items():
        counts[by_token[token]] += number
    return {name: number / occurrences.total() for name, number in counts.items()}


def _worst(
    found: TokenMap,
    by_token: dict[int, str],
    occurrences: Counter[int],
    student_tokenizer: Any,
    teacher_tokenizer: Any,
) -> Iterable[WorstToken]:
    raws = [vocabulary_of(tokenizer).raw for tokenizer in (student_tokenizer, teacher_tokenizer)]
    for token, number in occurrences.most_common():
        if by_token[token] != EXACT_MATCH:
            target = int(found.target[token])
            yield WorstToken(
                token=token,
                text=as_text(raws[1].get(token, b"")),
                share=number / occurrences.total(),
                coverage=by_token[token],
                student=as_text(raws[0].get(target, b"")) if target >= 0 else None,
            )
