"""The part of a batch that belongs to some of its examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from otkd.integrations.packing import PACKED_KEY


def of_examples(inputs: Mapping[str, Any], chosen: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The entries of the chosen examples, and where these are in the batch.

    Args:
        inputs: a batch, with one row per example, or with all examples packed into one row.
        chosen: boolean ``(examples,)``.

    Returns:
        The smaller batch, and the indices of its rows in the batch, or of its tokens in the row.

    Raises:
        ValueError: for a tensor that is not divided by examples.
    """
    lengths = inputs.get(PACKED_KEY)
    index = (chosen if lengths is None else chosen.repeat_interleave(lengths)).nonzero()[:, 0]
    if chosen.all():
        return dict(inputs), index
    if lengths is None:
        return {
            name: value[index] if _has_size(name, value, 0, len(chosen)) else value
            for name, value in inputs.items()
        }, index
    kept = lengths[chosen]
    part = {PACKED_KEY: kept} | _flash_arguments(kept)
    for name, value in inputs.items():
        if name not in part:
            divided = _has_size(name, value, 1, int(lengths.sum()))
            part[name] = value[:, index] if divided else value
    return {name: part[name] for name in inputs}, index


def _flash_arguments(lengths: Tensor) -> dict[str, Any]:
    """What flash attention reads of the examples of a row, see ``DataCollatorWithFlattening``."""
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max()) if len(lengths) else 0
    return {f"cu_seq_lens_{side}": ends for side in "qk"} | {
        f"max_length_{side}": longest for side in "qk"
    }


def _has_size(name: str, value: Any, dimension: int, size: int) -> bool:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    if value.ndim <= dimension or value.shape[dimension] != size:
        raise ValueError(
            f"the entry {name!r} of the batch has shape {tuple(value.shape)}, which is not divided "
            f"among the {size} {('examples', 'tokens')[dimension]}, so each teacher cannot be "
            "given its own: use one teacher, or a mixture (teacher_weights=)"
        )
    return True
