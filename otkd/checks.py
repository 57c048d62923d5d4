"""Checks of arguments, in one place, so that all losses give the same messages."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkd.scalars import as_not_negative, as_positive
from otkd.tensors import check_floating

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


IGNORE_INDEX = -100


def check_positive(**values: float) -> None:
    """Apply :func:`as_positive` to every named value."""
    for name, value in values.items():
        as_positive(name, value)


def check_not_negative(**values: float) -> None:
    """Apply :func:`as_not_negative` to every named value."""
    for name, value in values.items():
        as_not_negative(name, value)


def check_temperatures(temperature: float, teacher_temperature: float | None) -> float:
    """The teacher's temperature, by default the student's.

    Raises:
        TypeError, ValueError: unless both are finite numbers above 0.
    """
    temperature = as_positive("temperature", temperature)
    if teacher_temperature is None:
        return temperature
    return as_positive("teacher_temperature", teacher_temperature)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about the unknown ``name``: a question with the most similar one."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else "."


def check_one_logits(name: str, logits: Tensor) -> None:
    """Raise unless ``logits`` is a usable tensor ``(*batch, vocab)``.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`~otkd.tensors.check_floating`;
            ``ValueError`` for another shape.
    """
    check_floating(name, logits, "(*batch, vocab)")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name} must have shape (*batch, vocab) with vocab ≥ 1, got {tuple(logits.shape)}"
        )


def check_logits(student: Tensor, teacher: Tensor, *, same_vocabulary: bool = True) -> None:
    """Raise unless both are logits of the same positions.

    Raises:
        TypeError: if either is not a floating-point tensor.
        ValueError: if the batch shapes differ, the vocabulary is empty, the devices differ, or
            (with ``same_vocabulary``) the vocabularies differ in size.
    """
    check_one_logits("student_logits", student)
    if isinstance(teacher, Tensor) and student.device != teacher.device:
        raise ValueError(
            f"student_logits are on {student.device} but teacher_logits on {teacher.device}"
        )
    check_one_logits("teacher_logits", teacher)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits must have the same batch shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if same_vocabulary and student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student has {student.shape[-1]} tokens and the teacher {teacher.shape[-1]}. "
            "If the longer one is padded, pass vocab_size= (both are sliced there); if the "
            "vocabularies differ, use a loss that bridges them: PushforwardLoss(token_map), "
            "SinkhornLoss with EmbeddingCost(student_embedding, teacher_embedding), or "
            "UniversalLogitLoss"
        )


def check_positions(name: str, values: Tensor | None, batch_shape: Sequence[int]) -> None:
    """Raise unless ``values`` is None or has one entry per position.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if its shape is not ``batch_shape``.
    """
    if values is None:
        return
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if tuple(values.shape) != tuple(batch_shape):
        raise ValueError(
            f"{name} must have one entry per position, shape {tuple(batch_shape)}, "
            f"got {tuple(values.shape)}"
        )


def as_class_labels(labels: Tensor) -> Tensor:
    """Labels as int64, the type that torch requires for class indices.

    Raises:
        TypeError: if they are not an integer tensor.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"labels must be integer class indices, got {labels.dtype}. Regression targets, soft "
            "labels and several labels per position are not supported"
        )
    return labels if labels.dtype == torch.int64 else labels.long()


def check_class_labels(labels: Tensor, classes: int, *, of: str = "") -> None:
    """Raise ``ValueError`` unless each label is one of ``classes``, or −100.

    Only labels on the CPU are checked, because reading them from a device would synchronise.
    """
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    wrong = ((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= classes)
    if wrong.any():
        first = labels[wrong][0].item()
        raise ValueError(
            f"{int(wrong.sum())} labels are not a class{of}; the first is {first}. Labels must be "
            f"whole numbers from 0 to {classes - 1}, or {IGNORE_INDEX} for positions that do not "
            "count"
        )


def check_mask(mask: Tensor | None, batch_shape: Sequence[int]) -> None:
    """Raise unless ``mask`` is None or a valid mask with one entry per position.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if its shape is not ``batch_shape``, or it holds a negative number or NaN.
    """
    check_positions("mask", mask, batch_shape)
    if mask is None or mask.dtype == torch.bool:
        return
    if not (mask >= 0).all():
        raise ValueError(
            "mask must be boolean or non-negative (non-zero = included) and must not hold NaN. For "
            "an additive attention mask, pass mask == 0"
        )


def check_cost_shape(cost: Tensor, n: int, m: int) -> None:
    """Raise ``ValueError`` unless the cost is ``(n, m)`` or ``(*batch, n, m)``."""
    if cost.ndim < 2 or tuple(cost.shape[-2:]) != (n, m):
        raise ValueError(
            f"cost must have shape ({n}, {m}) or (*batch, {n}, {m}) to fit distributions of size "
            f"{n} and {m}, got {tuple(cost.shape)}"
        )


def check_finite_rows(rows: Tensor, what: str) -> None:
    """Raise ``ValueError`` if any entry of ``rows``, one per position, is not finite.

    A row of logits that holds NaN, +inf or only −inf has no softmax, and every result computed from
    it would be NaN.
    """
    if math.isfinite(rows.sum().item()):  # the usual case at once
        return
    bad = ~rows.isfinite()
    if bad.any():
        first = bad.flatten().nonzero()[0].item()
        raise ValueError(
            f"{int(bad.sum())} of {rows.numel()} positions have {what} (first: position {first}). "
            "Logits must hold no NaN or +inf, and at least one finite value per position. "
            "Positions that are masked out may hold any value"
        )


def refuse_second_derivative(what: str) -> None:
    """Raise ``RuntimeError`` in a backward pass with ``create_graph=True``.

    The gradient was computed together with the value, so autograd would treat it as a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} differentiable once: take the gradient without create_graph")
