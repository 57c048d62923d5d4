"""What a student's next-token predictions are worth, at every position."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def next_token_metrics(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Metrics of a student and its teacher at every position.

    Nothing is shifted or ignored: ``labels`` are the tokens that follow the positions.

    Args:
        student_logits: ``(*batch, vocab)``.
        teacher_logits: of the same shape.
        labels: the next tokens, int64, ``(*batch,)``.

    Returns:
        Tensors of the shape ``(*batch,)``: ``cross_entropy`` of the labels in nats, and whether the
        most probable token is the label (``accuracy``), both also of the teacher
        (``teacher_cross_entropy``, ``teacher_accuracy``); ``teacher_entropy`` in nats; and
        ``agreement``, whether student and teacher have the same most probable token. The last and
        the accuracies are boolean.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> import torch
        >>> from otkd.tasks.causal_lm import next_token_metrics
        >>> student, teacher = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[3.0, 2.0, 0.0]])
        >>> metrics = next_token_metrics(student, teacher, torch.tensor([1]))
        >>> metrics["agreement"], metrics["accuracy"], metrics["cross_entropy"]
        (tensor([True]), tensor([False]), tensor([3.0949]))
    """
    if student_logits.shape != teacher_logits.shape or labels.shape != student_logits.shape[:-1]:
        shapes = [tuple(each.shape) for each in (student_logits, teacher_logits, labels)]
        raise ValueError(
            "logits of student and teacher must be (*batch, vocab) and labels (*batch,), got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    chosen, theirs = student_logits.argmax(-1), teacher_logits.argmax(-1)
    return {
        "cross_entropy": _cross_entropy(student_logits, labels),
        "accuracy": chosen == labels,
        "agreement": chosen == theirs,
        "teacher_cross_entropy": _cross_entropy(teacher_logits, labels),
        "teacher_accuracy": theirs == labels,
        "teacher_entropy": torch.special.entr(teacher_logits.softmax(-1)).sum(-1),
    }


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    return cross_entropy(rows, labels.reshape(-1), reduction="none").view_as(labels)
