"""The prefix cost between the tokens of two tokenizers."""

from __future__ import annotations

from otkd.alignment.pieces import Tokenizer, Vocabulary, as_text, vocabulary_of
from otkd.costs import PrefixCost
from otkd.costs.prefix import TokenText


def prefix_cost(student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> PrefixCost:
    """0 between two tokens if the bytes of one begin those of the other, 1 otherwise.

    Special tokens are near only to the one with the same role, or the same text if they have none.
    Combine it with an embedding, which tells other tokens apart:

        cost = otkd.costs.SumCost([aligned_cost(...), prefix_cost(student_tok, teacher_tok)])

    Raises:
        TypeError: if either has no ``get_vocab``.

    Example:
        >>> class Words:
        ...     def __init__(self, *words):
        ...         self.words = words
        ...     def get_vocab(self):
        ...         return {word: token for token, word in enumerate(self.words)}
        >>> otkd.alignment.prefix_cost(Words("a", "b"), Words("abc", "c"))(2, 2)
        tensor([[0., 1.],
                [1., 1.]])
    """
    student, teacher = vocabulary_of(student_tokenizer), vocabulary_of(teacher_tokenizer)
    of_student = {token: f"role {token}" for token in student.roles.values()}
    of_teacher: dict[int, str] = {}
    for role, token in teacher.roles.items():
        if role in student.roles:
            of_teacher.setdefault(token, of_student[student.roles[role]])
    return PrefixCost(_texts(student, of_student), _texts(teacher, of_teacher))


def _texts(vocabulary: Vocabulary, roles: dict[int, str]) -> list[TokenText]:
    texts: list[TokenText] = []
    for token in range(vocabulary.size):
        raw = vocabulary.raw.get(token)
        if raw is not None and token in vocabulary.control:
            texts.append(f"text {as_text(raw)}")
        else:
            texts.append(raw if raw is not None else roles.get(token))
    return texts
