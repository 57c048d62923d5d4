"""Map a whole embedding into another vocabulary's space, with shared tokens as anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from otkd.alignment.maps import AnchorMap, check_embedding, fit_map
from otkd.alignment.pieces import Tokenizer
from otkd.alignment.tokens import shared_tokens
from otkd.costs import EmbeddingCost
from otkd.neighbour_search import mutual_neighbours
from otkd.scalars import as_whole

TokenIds = Tensor | Sequence[int]


def align_embeddings(
    student_embedding: Float[Tensor, "student_tokens student_width"],
    teacher_embedding: Float[Tensor, "teacher_tokens teacher_width"],
    student_tokenizer: Tokenizer | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    *,
    anchors: tuple[TokenIds, TokenIds] | None = None,
    method: str = "procrustes",
    ridge: float | Literal["loo"] | None = None,
    refine: int = 0,
) -> tuple[Float[Tensor, "student_tokens teacher_width"], AnchorMap]:
    """The student's embedding in the teacher's space, mapped with the shared tokens as anchors.

    Args:
        student_embedding: ``(student_tokens, student_width)``. Padding rows beyond the tokenizer's
            tokens are mapped like all others and are never anchors.
        teacher_embedding: ``(teacher_tokens, teacher_width)``, likewise.
        student_tokenizer: the student's tokenizer.
        teacher_tokenizer: the teacher's tokenizer. The anchors are their :func:`shared_tokens`.
        anchors: ids of the same tokens in both vocabularies, ``(student_ids, teacher_ids)``, in
            place of the tokenizers.
        method: see :func:`~otkd.alignment.maps.fit_map`.
        ridge: see :func:`~otkd.alignment.maps.fit_map`.
        refine: how many times to add tokens to the anchors and to fit the map again: pairs of
            other tokens that are nearest to each other in the teacher's space. Needs faiss.

    Returns:
        The mapped embedding, a constant ``(student_tokens, teacher_width)``, and the map.

    Raises:
        ImportError: for ``refine`` without faiss.
        TypeError, ValueError: for missing tokenizers or anchors, ids out of range, rows that are
            not finite, and everything that ``fit_map`` refuses.

    Example:
        >>> teacher = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
        >>> student = -2 * teacher[[3, 2, 1, 0]]  # other order, other space
        >>> anchors = ([0, 1, 2], [3, 2, 1])
        >>> mapped, _ = otkd.alignment.align_embeddings(student, teacher, anchors=anchors)
        >>> torch.allclose(mapped[3], teacher[0], atol=1e-5)
        True
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
    student, teacher = student_embedding.detach(), teacher_embedding.detach()
    refine = as_whole("refine", refine, least=0)
    pairs = student_ids, teacher_ids
    while True:
        anchor_map = fit_map(
            student[pairs[0].to(student.device)],
            teacher[pairs[1].to(teacher.device)],
            method=method,
            ridge=ridge,
        )
        mapped = anchor_map.apply(student)
        if not refine:
            return mapped, anchor_map
        refine -= 1
        found = _mutual(mapped, teacher, student_ids, teacher_ids)
        pairs = torch.cat([student_ids, found[0]]), torch.cat([teacher_ids, found[1]])


def aligned_cost(
    student_embedding: Float[Tensor, "student_tokens student_width"],
    teacher_embedding: Float[Tensor, "teacher_tokens teacher_width"],
    student_tokenizer: Tokenizer | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    *,
    anchors: tuple[TokenIds, TokenIds] | None = None,
    method: str = "procrustes",
    ridge: float | Literal["loo"] | None = None,
    refine: int = 0,
    metric: str = "sqeuclidean",
) -> EmbeddingCost:
    """The cost between the tokens of two vocabularies, measured in the teacher's space.

    If the logits are padded, pass the embeddings without the padding rows, and
    ``vocab_size=(student_tokens, teacher_tokens)`` to the loss. The cost is constant.

    Args:
        student_embedding: see :func:`align_embeddings`.
        teacher_embedding: see :func:`align_embeddings`.
        student_tokenizer: see :func:`align_embeddings`.
        teacher_tokenizer: see :func:`align_embeddings`.
        anchors: see :func:`align_embeddings`.
        method: see :func:`align_embeddings`.
        ridge: see :func:`align_embeddings`.
        refine: see :func:`align_embeddings`.
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
        refine=refine,
    )
    return EmbeddingCost(mapped.to(teacher_embedding.device), teacher_embedding, metric=metric)


def _mutual(
    mapped: Tensor, teacher: Tensor, student_ids: Tensor, teacher_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens that are not anchors and nearest to each other.

    Source: Conneau et al. (2018), "Word Translation Without Parallel Data", for this refinement.
    """
    others = []
    for rows, ids in ((mapped, student_ids), (teacher, teacher_ids)):
        is_other = torch.ones(len(rows), dtype=torch.bool)
        is_other[ids.cpu()] = False
        others.append(is_other.nonzero().squeeze(-1))
    if not all(map(len, others)):
        return others[0][:0], others[1][:0]
    student, teacher_rows = (
        mapped[others[0].to(mapped.device)],
        teacher[others[1].to(teacher.device)],
    )
    found = mutual_neighbours(student, teacher_rows, purpose="refine")
    return others[0][found[0]], others[1][found[1]]


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
            f"token {ids[bad][0].item()} of the {side}'s anchors is outside the {size} rows of the "
            f"{side}'s embedding: pass the embedding of the model that the tokenizer belongs to"
        )
    return ids.long()
