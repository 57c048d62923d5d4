"""Two vocabularies: which positions, which tokens and which costs correspond.

Positions: :func:`align_positions` finds where two tokenisations of a text have read the same bytes.

Costs: the distance between tokens of two vocabularies is meaningless while their embeddings lie in
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
from otkd.alignment.audit import Audit, WorstToken, audit
from otkd.alignment.chat import render_chat
from otkd.alignment.ends import TokenEnds, token_ends
from otkd.alignment.given_tokens import ends_of_ids
from otkd.alignment.maps import AnchorMap, fit_map
from otkd.alignment.matching import token_map
from otkd.alignment.normal_text import normalized_for
from otkd.alignment.pieces import Tokenizer
from otkd.alignment.positions import AlignedPositions, align_positions, common_positions
from otkd.alignment.prefixes import prefix_cost
from otkd.alignment.spans import span_likelihood_divergence
from otkd.alignment.token_map import TokenMap
from otkd.alignment.tokens import SharedTokens, shared_tokens

__all__ = [
    "AlignedPositions",
    "AnchorMap",
    "Audit",
    "SharedTokens",
    "TokenEnds",
    "TokenMap",
    "Tokenizer",
    "WorstToken",
    "align_embeddings",
    "align_positions",
    "aligned_cost",
    "audit",
    "common_positions",
    "ends_of_ids",
    "fit_map",
    "normalized_for",
    "prefix_cost",
    "render_chat",
    "shared_tokens",
    "span_likelihood_divergence",
    "token_ends",
    "token_map",
]
