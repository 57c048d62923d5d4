"""From the student's embedding space to the teacher's, through the tokens that both know.

Two vocabularies have no common space in which the distance of their tokens would mean anything.
The tokens that both have (:func:`shared_tokens`) are anchors; a linear map fitted on them
(:func:`fit_map`) brings every other token over, and the distances there are a ground cost:

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
