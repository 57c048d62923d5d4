"""From one value per position to the number that is minimised: mask, batch normalisation, T²."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from otkd.checks import (
    IGNORE_INDEX,
    check_choice,
    check_mask,
    check_not_negative,
    check_positions,
)

REDUCTIONS = ("mean", "sum", "none", "sequence_mean")


def counted_positions(
    batch_shape: tuple[int, ...],
    mask: Shaped[Tensor, "..."] | None = None,
    labels: Shaped[Tensor, "..."] | None = None,
) -> Bool[Tensor, "..."] | None:
    """Which positions count: those the mask keeps and whose label is not −100.

    Returns:
        A boolean tensor ``(*batch,)``, or None where every position counts.

    Raises:
        TypeError: if ``mask`` or ``labels`` is no tensor.
        ValueError: if either does not have the shape ``(*batch,)``, or ``mask`` holds a negative
            number or NaN.
    """
    check_mask(mask, batch_shape)
    check_positions("labels", labels, batch_shape)
    counted = None if mask is None else mask != 0
    if labels is not None:
        labelled = labels != IGNORE_INDEX
        counted = labelled if counted is None else counted & labelled
    return counted


def reduce_positions(
    values: Float[Tensor, "*batch"],
    counted: Bool[Tensor, "*batch"] | None = None,
    *,
    reduction: str = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
) -> Float[Tensor, "..."]:
    """Reduce one value per position; values at positions that do not count must be 0.

    - ``"mean"``: ``Σ values / n`` with n the number of counted positions, or
      ``num_items_in_batch`` where it is given, so that microbatches that share it add up to the
      whole batch. Without any counted position the result is 0 with a zero gradient.
    - ``"sum"``: ``Σ values``.
    - ``"none"``: the values themselves, 0 where a position does not count.
    - ``"sequence_mean"``: the mean over the counted positions of each sequence (the last batch
      dimension), then over the sequences that have any. It ignores ``num_items_in_batch``, which
      counts positions: microbatches do not add up under it.

    Raises:
        ValueError: for an unknown ``reduction``, or a negative number of items.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if isinstance(num_items_in_batch, int | float):
        check_not_negative(num_items_in_batch=num_items_in_batch)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        items = num_items_in_batch
        if items is None:
            items = values.numel() if counted is None else counted.sum()
        return values.sum() / _at_least(items, 1, values)
    if counted is None:
        counted = torch.ones_like(values, dtype=torch.bool)
    lengths = counted.sum(-1)
    sequence_means = values.sum(-1) / lengths.clamp(min=1)
    return sequence_means.sum() / (lengths > 0).sum().clamp(min=1)


def _at_least(count: int | float | Tensor, least: int, like: Tensor) -> float | Tensor:
    if isinstance(count, Tensor):
        return count.reshape(()).to(like).clamp(min=least)
    return max(count, least)
