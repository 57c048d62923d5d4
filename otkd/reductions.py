"""From one value per position to a scalar: mask, reduction and number of items."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from otkd.checks import (
    IGNORE_INDEX,
    check_choice,
    check_mask,
    check_not_negative,
    check_positions,
)

REDUCTIONS = ("mean", "sum", "none", "sequence_mean")


@dataclass(frozen=True)
class ItemCounts:
    """Number of counted items in a whole batch, for losses with different reductions.

    Attributes:
        positions: counted positions; ``"mean"`` divides by it.
        sequences: sequences with a counted position; ``"sequence_mean"`` divides by it.
    """

    positions: int | float | Tensor
    sequences: int | float | Tensor


def count_items(counted: Bool[Tensor, "*batch"]) -> Int[Tensor, "2"]:
    """Number of counted positions and of sequences with one, without synchronising the device.

    Sequences lie along the last dimension. With at most one dimension each position is a sequence.
    """
    positions = counted.sum()
    sequences = counted.any(-1).sum() if counted.ndim > 1 else positions
    return torch.stack([positions, sequences])


def counted_positions(
    batch_shape: tuple[int, ...],
    mask: Shaped[Tensor, "..."] | None = None,
    labels: Shaped[Tensor, "..."] | None = None,
) -> Bool[Tensor, "..."] | None:
    """Which positions count: those that the mask includes and whose label is not −100.

    Returns:
        A boolean tensor ``(*batch,)``, or None if every position counts.

    Raises:
        TypeError: if ``mask`` or ``labels`` is not a tensor.
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
    num_items_in_batch: int | float | Tensor | ItemCounts | None = None,
) -> Float[Tensor, "..."]:
    """Reduce one value per position; values at positions that do not count must be 0.

    - ``"mean"``: ``Σ values / n``, where n is ``num_items_in_batch`` or, by default, the number of
      counted positions. Microbatches with the same ``num_items_in_batch`` add up to the whole
      batch. Without a counted position the result is 0 with zero gradient.
    - ``"sum"``: ``Σ values``.
    - ``"none"``: the values themselves, 0 where a position does not count.
    - ``"sequence_mean"``: the mean over the counted positions of each sequence (the last batch
      dimension), then over the sequences that have one. The second mean divides by
      ``num_items_in_batch.sequences`` if an :class:`ItemCounts` is given. A plain
      ``num_items_in_batch`` counts positions and is ignored, so that microbatches do not add up.
      With one batch dimension each position is a sequence, and the result is that of ``"mean"``.

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
    items, sequences = num_items_in_batch, None
    if isinstance(items, ItemCounts):
        items, sequences = items.positions, items.sequences
    if reduction == "mean":
        if items is None:
            items = values.numel() if counted is None else counted.sum()
        return values.sum() / _at_least(items, 1, values)
    if counted is None:
        counted = torch.ones_like(values, dtype=torch.bool)
    if values.ndim > 1:
        values = values.sum(-1) / counted.sum(-1).clamp(min=1)
    if sequences is None:
        sequences = count_items(counted)[1]
    return values.sum() / _at_least(sequences, 1, values)


def _at_least(count: int | float | Tensor, least: int, like: Tensor) -> float | Tensor:
    if isinstance(count, Tensor):
        return count.reshape(()).to(like).clamp(min=least)
    return max(count, least)
