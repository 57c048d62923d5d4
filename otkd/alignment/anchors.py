"""Whole embeddings, from one vocabulary's space to the other's, by anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from otkd.alignment.maps import AnchorMap, check_embedding, fit_map
from otkd.alignment.tokens import Tokenizer, shared_tokens
from otkd.costs import EmbeddingCost

TokenIds = Tensor | Sequence[int]


def align_embeddings(
    student_embedding: Float[Tensor, "student_tokens student_width"],
    teacher_embedding: Float[Tensor, "teacher_tokens teacher_width"],
    student_tokenizer: Tokenizer | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    *,
    anchors: tuple[TokenIds, TokenIds] | None = None,
    method: str = "procrustes",
    ridge: float | None = None,
) -> tuple[Float[Tensor, "student_tokens teacher_width"], AnchorMap]:
    """The student's embedding in the teacher's space, by the tokens that both know.

    Args:
        student_embedding: ``(student_tokens, student_width)``. Rows beyond the tokenizer's tokens,
            to which models pad, are mapped as all others and never are anchors.
        teacher_embedding: ``(teacher_tokens, teacher_width)``, likewise.
        student_tokenizer: the student's.
        teacher_tokenizer: the teacher's; the anchors are their :func:`shared_tokens`.
        anchors: ids of the same tokens in the two vocabularies, ``(student_ids, teacher_ids)``, in
            the place of the tokenizers.
        method: see :func:`~otkd.alignment.maps.fit_map`.
        ridge: likewise.

    Returns:
        The mapped embedding, a constant ``(student_tokens, teacher_width)``, and the map.

    Raises:
        TypeError, ValueError: for tokenizers or anchors that are missing, ids out of range, rows
            that are not finite, and all that ``fit_map`` refuses.
    """
    check_embedding("student embedding", student_embedding)
    check_embedding("teacher embedding", teacher_embedding)
    tokenizers = (student_tokenizer, teacher_tokenizer)
    if anchors is None:
        if student_tokenizer is None or teacher_tokenizer is None:
            raise ValueError("pass both tokenizers, or anchors=(student_ids, teacher_ids)")
        shared = shared_tokens(student_tokenizer, teacher_tokenizer)
        anchors = shared.student, shared.teacher
    elif tokenizers != (None, None):
        raise ValueError("pass the tokenizers or anchors=, not both")
    student_ids = _token_ids("student", anchors[0], len(student_embedding))
    teacher_ids = _token_ids("teacher", anchors[1], len(teacher_embedding))
    anchor_map = fit_map(
        student_embedding.detach()[student_ids.to(student_embedding.device)],
        teacher_embedding.detach()[teacher_ids.to(teacher_embedding.device)],
        method=method,
        ridge=ridge,
    )
    return anchor_map.apply(student_embedding.detach()), anchor_map


def aligned_cost(
    student_embedding: Float[Tensor, "student_tokens student_width"],
    teacher_embedding: Float[Tensor, "teacher_tokens teacher_width"],
    student_tokenizer: Tokenizer | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    *,
    anchors: tuple[TokenIds, TokenIds] | None = None,
    method: str = "procrustes",
    ridge: float | None = None,
    metric: str = "sqeuclidean",
) -> EmbeddingCost:
    """The cost between the tokens of two vocabularies, in the teacher's space; a constant.

    Where the logits are padded, give the embeddings up to the last real token each, and the loss
    ``vocab_size=(student_tokens, teacher_tokens)``.

    Args:
        student_embedding: see :func:`align_embeddings`, as the others.
        teacher_embedding: likewise.
        student_tokenizer: likewise.
        teacher_tokenizer: likewise.
        anchors: likewise.
        method: likewise.
        ridge: likewise.
        metric: see :class:`~otkd.costs.EmbeddingCost`.

    Raises:
        TypeError, ValueError: as :func:`align_embeddings` and :class:`~otkd.costs.EmbeddingCost`.
    """
    mapped, _ = align_embeddings(
        student_embedding,
        teacher_embedding,
        student_tokenizer,
        teacher_tokenizer,
        anchors=anchors,
        method=method,
        ridge=ridge,
    )
    return EmbeddingCost(mapped.to(teacher_embedding.device), teacher_embedding, metric=metric)


def _token_ids(side: str, ids: TokenIds, size: int) -> Tensor:
    ids = torch.as_tensor(ids)
    if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(
            f"the {side}'s anchors must be a sequence of token ids, got shape {tuple(ids.shape)} "
            f"of {ids.dtype}"
        )
    bad = (ids < 0) | (ids >= size)
    if bad.any():
        raise ValueError(
            f"token {ids[bad][0].item()} of the {side}'s anchors is beyond the {size} rows of the "
            f"{side}'s embedding: give the embedding of the model that the tokenizer is for"
        )
    return ids.long()
