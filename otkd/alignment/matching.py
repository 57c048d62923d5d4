"""The map between the tokens of two tokenizers."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from otkd.alignment.encoding import check_fast
from otkd.alignment.ends import TokenEnds, token_ends
from otkd.alignment.first_tokens import NOTHING as NO_TOKEN
from otkd.alignment.first_tokens import first_tokens
from otkd.alignment.pieces import Vocabulary, vocabulary_of
from otkd.alignment.positions import common_positions
from otkd.alignment.token_map import EXACT, FIRST, LONGER, NOTHING, ROLE, TokenMap
from otkd.files import cache_folder

_FORMAT = 1  # to be raised if the rules change
LONGER_SHARE = 0.05
"""Of a token's weight, what longer tokens of the student have together if no texts tell.

At 2 to 8 % of the common positions of film reviews, the student's next token is such a longer one
(five pairs of tokenizers with 8,000 to 49,000 tokens).
"""


def token_map(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    texts: Iterable[str] | None = None,
    cache_dir: str | Path | None = None,
) -> TokenMap:
    """For each token of the teacher, the tokens with which the student begins to write it.

    In this order:

    1. ``"role"``: special tokens with the same role (eos, bos, pad, unk, cls, sep, mask). Other
       special tokens match only if both tokenizers write them in the same way.
    2. ``"exact"``: the token that stands for the same bytes.
    3. ``"first"``: the first token of the student's tokenisation of its bytes.
    4. ``"longer"``: no such token, but longer tokens of the student begin with it.
    5. ``"nothing"``: the student cannot write it, as WordPiece cannot write a newline.

    A token of the student that the teacher does not have begins, in the teacher's tokenisation,
    with a token t. When the teacher is about to write t, the student may be about to write this
    longer token. How often depends on the texts, so ``texts`` are counted: with n(t, s), how often
    the student's next token is s at a common position where the teacher's is t, and r the rule
    above, M = (n(t, s) + r(t, s))/(n(t) + 1). Without texts, all longer tokens of t together have
    5 % of its weight, evenly: the share is small because short tokens begin hundreds of longer
    ones, which would drown the token itself.

    Args:
        student_tokenizer: a fast tokenizer of transformers.
        teacher_tokenizer: likewise.
        texts: texts of the kind that the student is trained on, which neither tokenizer changes;
            see :func:`~otkd.alignment.normalized_for`. Some hundred are enough.
        cache_dir: where the map without texts is kept, by the hash of both tokenizers; by default
            ``$OTKD_CACHE``, else ``~/.cache/otkd``.

    Raises:
        TypeError: for a slow tokenizer.
        ValueError: for texts that a tokenizer changes.

    Warns:
        UserWarning: if the file of the cache is damaged, or cannot be read or written.

    Example:
        >>> import tokenizers, transformers
        >>> def of(*words):
        ...     model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "")
        ...     backend = tokenizers.Tokenizer(model)
        ...     return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
        >>> found = otkd.alignment.token_map(of("t", "the", "b"), of("the", "then", "a"))
        >>> found.student, [found.KINDS[kind] for kind in found.kinds]
        (tensor([1, 1]), ['exact', 'first', 'nothing'])
    """
    check_fast(student_tokenizer)
    check_fast(teacher_tokenizer)
    found = _kept(student_tokenizer, teacher_tokenizer, cache_dir)
    if texts is None:
        return found
    return _counted(found, student_tokenizer, teacher_tokenizer, texts)


def _kept(student: Any, teacher: Any, cache_dir: str | Path | None) -> TokenMap:
    """The map by rule, from the cache if it is there."""
    folder = cache_folder(cache_dir)
    if folder is None or util.find_spec("safetensors") is None:
        return _by_rule(student, teacher)
    key = hashlib.sha256(f"{_FORMAT} {_digest(student)} {_digest(teacher)}".encode()).hexdigest()
    path = folder / "token_maps" / f"{key}.safetensors"
    try:
        return TokenMap.load(path)
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:
        warnings.warn(f"{path} cannot be used and is computed again: {error}", stacklevel=3)
    found = _by_rule(student, teacher)
    try:
        found.save(path)
    except OSError as error:
        warnings.warn(f"the map could not be written to {path}: {error}", stacklevel=3)
    return found


def _digest(tokenizer: Any) -> str:
    """Of everything that decides how a text is tokenised."""
    described = tokenizer.backend_tokenizer.to_str()
    # Truncation and padding come first. Calls of the tokenizer change them.
    described = described[described.find('"added_tokens"') :]
    vocabulary = vocabulary_of(tokenizer)
    settings = sorted(vocabulary.roles.items()), sorted(vocabulary.control)
    return hashlib.sha256(f"{settings} {described}".encode()).hexdigest()


def _by_rule(student_tokenizer: Any, teacher_tokenizer: Any) -> TokenMap:
    student, teacher = vocabulary_of(student_tokenizer), vocabulary_of(teacher_tokenizer)
    target = [NO_TOKEN] * teacher.size
    kinds = [NOTHING] * teacher.size
    for role in reversed(teacher.roles):  # the first role of a token is written last
        if role in student.roles:
            target[teacher.roles[role]], kinds[teacher.roles[role]] = student.roles[role], ROLE
    for token, match in _same_tokens(student_tokenizer, teacher_tokenizer, student, teacher):
        target[token], kinds[token] = match, EXACT
    others = [
        token
        for token in teacher.raw
        if kinds[token] == NOTHING and token not in teacher.control and teacher.raw[token]
    ]
    first = first_tokens(student_tokenizer, student, (teacher.raw[token] for token in others))
    for token, match in zip(others, first, strict=True):
        if match != NO_TOKEN:
            target[token], kinds[token] = match, FIRST
    entries: list[tuple[int, int, float]] = []
    longer = _longer_tokens(teacher_tokenizer, student, teacher)
    for token, match in enumerate(target):
        beyond = longer.get(token, []) if kinds[token] != ROLE else []
        if match != NO_TOKEN:
            entries.append((match, token, 1 - LONGER_SHARE if beyond else 1.0))
        elif beyond:
            kinds[token] = LONGER
        entries += [(each, token, LONGER_SHARE / len(beyond)) for each in beyond]
    matched, tokens, weights = zip(*entries, strict=True) if entries else ((), (), ())
    return TokenMap.of_weights(
        student=torch.tensor(matched, dtype=torch.long),
        teacher=torch.tensor(tokens, dtype=torch.long),
        weight=torch.tensor(weights, dtype=torch.float64),
        target=torch.tensor(target, dtype=torch.long),
        kinds=torch.tensor(kinds, dtype=torch.uint8),
        vocab_size=(student.size, teacher.size),
    )


def _same_tokens(
    student_tokenizer: Any, teacher_tokenizer: Any, student: Vocabulary, teacher: Vocabulary
) -> Iterable[tuple[int, int]]:
    """The teacher's tokens without a role that the student has, too."""
    pieces = student_tokenizer.get_vocab()
    one_family = student.family == teacher.family
    for piece, token in teacher_tokenizer.get_vocab().items():
        raw = teacher.raw.get(token)
        if raw is None:
            continue
        # Two tokens of a vocabulary may stand for the same bytes: the one written alike is meant.
        same = pieces.get(piece)
        both_added = token in teacher.added and same in student.added
        is_same = same in student.raw and student.raw[same] == raw
        if is_same and (both_added or one_family):
            yield token, same
        elif token not in teacher.control and teacher.ids[raw] == token and raw in student.ids:
            match = student.ids[raw]
            if match not in student.control:
                yield token, match


def _longer_tokens(
    teacher_tokenizer: Any, student: Vocabulary, teacher: Vocabulary
) -> dict[int, list[int]]:
    """The student's tokens that the teacher does not have, by the teacher's first token of each."""
    others = [
        token
        for token, raw in student.raw.items()
        if raw and raw not in teacher.ids and token not in student.control
    ]
    first = first_tokens(teacher_tokenizer, teacher, (student.raw[token] for token in others))
    longer: dict[int, list[int]] = defaultdict(list)
    for token, begin in zip(others, first, strict=True):
        if begin in teacher.raw and len(teacher.raw[begin]) < len(student.raw[token]):
            longer[begin].append(token)
    return longer


def _counted(
    rule: TokenMap, student_tokenizer: Any, teacher_tokenizer: Any, texts: Iterable[str]
) -> TokenMap:
    """The rule, and how often each pair of tokens begins at a common position of the texts."""
    pairs = [rule.student.new_zeros(2, 0)]
    for text in texts:
        student, teacher = (
            token_ends(tokenizer, text, add_special_tokens=False)
            for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        found = common_positions(student, teacher)
        if len(student) and len(teacher):
            pairs.append(
                torch.stack([_next(student, found.student), _next(teacher, found.teacher)])
            )
    student_ids, teacher_ids = torch.cat(pairs, 1)
    control = torch.tensor(sorted(vocabulary_of(student_tokenizer).control), dtype=torch.long)
    is_text = ~torch.isin(student_ids, control)  # an unknown token is none
    student_ids, teacher_ids = student_ids[is_text], teacher_ids[is_text]
    kinds = rule.kinds.clone()
    kinds[teacher_ids[kinds[teacher_ids] == NOTHING]] = LONGER
    return TokenMap.of_weights(
        torch.cat([rule.student, student_ids]),
        torch.cat([rule.teacher, teacher_ids]),
        torch.cat([rule.weight.double(), torch.ones(len(student_ids), dtype=torch.float64)]),
        rule.target,
        kinds,
        rule.vocab_size,
    )


def _next(ends: TokenEnds, places: Tensor) -> Tensor:
    """The first token of the text, and the one after each position but the last."""
    ids = torch.tensor(ends.ids, dtype=torch.long)
    return torch.cat([ids[:1], ids[places[:-1] + 1]])
