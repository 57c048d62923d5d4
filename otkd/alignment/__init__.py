"""Alignment of two vocabularies: maps the student's embedding into the teacher's space.

The distance between tokens of two vocabularies is meaningless while their embeddings lie in
different spaces. The tokens that both vocabularies contain (:func:`shared_tokens`) are anchors. A
linear map fitted on them (:func:`fit_map`) maps all other tokens, and the distance in the teacher's
space is the ground cost:

    cost = otkd.alignment.aligned_cost(
        student.get_input_embeddings().weight,
        teacher.get_input_embeddings().weight,
        student_tokenizer,
        teacher_tokenizer,
    )
    loss = otkd.SinkhornLoss(cost)
"""

from otkd.alignment.anchors import align_embeddings, aligned_cost
from otkd.alignment.maps import AnchorMap, fit_map
from otkd.alignment.tokens import SharedTokens, Tokenizer, shared_tokens

__all__ = [
    "AnchorMap",
    "SharedTokens",
    "Tokenizer",
    "align_embeddings",
    "aligned_cost",
    "fit_map",
    "shared_tokens",
]
