"""Exact transport between the two token distributions of each position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from otkd.checks import check_finite_rows, check_logits, check_mask, check_temperatures
from otkd.compilation import outside_graphs
from otkd.costs import Cost
from otkd.ot.exact import exact_transport
from otkd.precision import compute_dtype


@outside_graphs
def wasserstein_distance(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch teacher_vocab"],
    *,
    cost: Cost | Tensor,
    p: float = 1.0,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Exact transport min_P ⟨P, C^p⟩ between q and p over the tokens; no root 1/p is taken.

    Closed forms are used for two tokens, for the 0/1 cost (total variation) and for |i − j|^r with
    r·p ≥ 1. For other costs a linear program is solved per position, in float64 on the CPU.

    Args:
        student_logits: ``(*batch, vocab)``; q.
        teacher_logits: ``(*batch, vocab)``; p, a constant.
        cost: a cost object of :mod:`otkd.costs`, or a ``(vocab, vocab)`` tensor.
        p: power of the cost.
        temperature: divides the logits of both sides.
        teacher_temperature: if given, divides the teacher's logits instead.
        mask: ``(*batch,)``; where it is zero, the value is 0 and the logits may hold any value.

    Raises:
        TypeError, ValueError: for wrong shapes, NaN in a counted position, or a vocabulary above
            ``otkd.ot.exact.LARGEST_PROGRAM`` tokens without a closed form.
    """
    return at_counted_positions(
        lambda q, teacher: exact_transport(q, teacher, cost, p=p),
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )


def at_counted_positions(
    transport: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    teacher_temperature: float | None,
    mask: Tensor | None,
) -> Tensor:
    """``transport(q, p)`` for the distributions ``(positions, vocab)`` that count; 0 elsewhere."""
    check_logits(student_logits, teacher_logits, same_vocabulary=False)
    batch_shape = student_logits.shape[:-1]
    check_mask(mask, batch_shape)
    student = student_logits.flatten(0, -2) if batch_shape else student_logits.unsqueeze(0)
    teacher = teacher_logits.flatten(0, -2) if batch_shape else teacher_logits.unsqueeze(0)
    counted = None
    if mask is not None:
        counted = mask.reshape(-1).nonzero().squeeze(-1)
        student, teacher = student[counted], teacher[counted]
    q, p = distributions(
        student, teacher, temperature=temperature, teacher_temperature=teacher_temperature
    )
    # Without a counted position there is nothing to solve; the sum gives a zero gradient.
    values = transport(q, p) if len(q) else q.sum(-1)
    if counted is not None:
        values = values.new_zeros(batch_shape.numel()).index_copy(0, counted, values)
    return values.reshape(batch_shape)


def distributions(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    teacher_temperature: float | None,
) -> tuple[Tensor, Tensor]:
    """The distributions q and p, ``softmax(logits / T)``, in at least float32; p is a constant.

    Raises:
        ValueError: if a temperature is not positive or a row of logits has no softmax.
    """
    teacher_temperature = check_temperatures(temperature, teacher_temperature)
    dtype = compute_dtype(student_logits)
    q = torch.softmax(student_logits.to(dtype) / temperature, -1)
    p = torch.softmax(teacher_logits.detach().to(dtype) / teacher_temperature, -1)
    for name, probabilities in (("student_logits", q), ("teacher_logits", p)):
        check_finite_rows(probabilities.detach()[..., 0], f"{name} without a softmax")
    return q, p
