"""Which positions of a batch count: labels, masks, and the starts of documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from otkd.checks import as_class_labels
from otkd.integrations.aligning import ALIGNED_KEY
from otkd.integrations.packing import PACKED_KEY
from otkd.integrations.stored import TEACHER_INDEX, TEACHER_KEY
from otkd.reductions import IGNORE_INDEX


def label_names_of(names: Iterable[str], given: Iterable[str] | None) -> tuple[str, ...]:
    """The entries of a batch that may hold its labels besides ``labels``.

    Args:
        names: those that Trainer found in the signature of the model.
        given: ``label_names`` of the training arguments.
    """
    usual = (name for name in names if name in ("label", "label_ids"))
    return tuple(usual if given is None else given)


def without_labels(inputs: Mapping[str, Any], label_names: Iterable[str] = ()) -> dict[str, Any]:
    """The entries of a batch that models read: without labels and the entries of the trainer."""
    own = {TEACHER_KEY, TEACHER_INDEX, PACKED_KEY, ALIGNED_KEY}
    taken = {"labels", "shift_labels", *own, *label_names}
    return {name: value for name, value in inputs.items() if name not in taken}


def label_key(inputs: Mapping[str, Any], label_names: Iterable[str] = ()) -> str | None:
    """The entry of a batch that holds its labels: ``labels``, or the only one of ``label_names``.

    Raises:
        ValueError: if several entries are named as labels.
    """
    if inputs.get("labels") is not None:
        return "labels"
    found = [name for name in label_names if inputs.get(name) is not None]
    if len(found) > 1:
        raise ValueError(
            f"the batch has labels for several heads, {', '.join(found)}, but a loss uses those of "
            "one: name it with TrainingArguments(label_names=[...])"
        )
    return found[0] if found else None


def find_targets(
    inputs: Mapping[str, Any], *, shift: bool, mask_name: str, label_names: Iterable[str] = ()
) -> tuple[Tensor | None, Tensor | None]:
    """The labels of a batch, or without them its mask, aligned with the logits of the loss.

    The first token of a text does not count where another packed document, or padding on the left,
    would predict it.

    Args:
        inputs: the batch.
        shift: whether logits are paired with the label of the next position.
        mask_name: the entry that masks the tokens that the logits belong to.
        label_names: see :func:`label_key`.

    Returns:
        Int64 labels ``(*batch,)`` or None; without labels, a mask ``(*batch,)``, or None if every
        position counts.

    Raises:
        TypeError: if labels are not integers.
        ValueError: if there are no labels and only a mask over pairs of tokens.
    """
    if inputs.get("shift_labels") is not None:
        labels = as_class_labels(inputs["shift_labels"])
        starts = text_starts(inputs, labels.shape[-1], mask_name)
        if starts is not None:
            labels = labels.masked_fill(pad(starts, (0, 1)), IGNORE_INDEX)
        return labels, None
    key = label_key(inputs, label_names)
    if key is not None:
        labels = as_class_labels(inputs[key])
        if shift:
            starts = text_starts(inputs, labels.shape[-1], mask_name)
            labels = labels[..., 1:]
            if starts is not None:
                labels = labels.masked_fill(starts, IGNORE_INDEX)
        return labels, None
    mask = inputs.get(mask_name)
    if mask is not None and mask.ndim > 2:
        raise ValueError(
            f"{mask_name} {tuple(mask.shape)} is a mask over pairs of tokens and does not show "
            "which tokens are padding: give labels, with -100 where a token does not count"
        )
    if not shift:
        return None, mask
    if mask is not None:
        mask = mask[..., 1:] != 0
    shape = _tokens_shape(inputs)
    starts = None if shape is None else text_starts(inputs, shape[1], mask_name)
    if shape is not None and starts is not None:
        continues = ~starts.expand(shape[0], -1)
        mask = continues if mask is None else mask & continues
    return None, mask


def text_starts(inputs: Mapping[str, Any], length: int, mask_name: str) -> Tensor | None:
    """Whether tokens 1, 2, … follow padding, or belong to another document than the token before.

    Documents are read from ``position_ids`` that start again, or from ``seq_idx``,
    ``cu_seq_lens_q`` or an ``attention_mask`` with document numbers.

    Returns:
        Boolean ``(*batch, length − 1)``, or with a batch size of 1 for all rows; None if the batch
        has none of these.
    """
    found = []
    positions = _of_tokens(inputs.get("position_ids"), length)
    if positions is not None:
        found.append(positions[..., 1:] <= positions[..., :-1])
    documents = _of_tokens(inputs.get("seq_idx"), length)
    if documents is not None:
        found.append(documents[..., 1:] != documents[..., :-1])
    ends = inputs.get("cu_seq_lens_q")
    if isinstance(ends, Tensor):
        index = torch.arange(length, device=ends.device, dtype=ends.dtype)
        document = torch.bucketize(index, ends, right=True)
        found.append((document[1:] != document[:-1]).unsqueeze(0))
    mask = _of_tokens(inputs.get(mask_name), length)
    if mask is not None:
        following, before = mask[..., 1:], mask[..., :-1]
        found.append((following != before) & (following != 0))
    starts = None
    for each in found:
        starts = each if starts is None else starts | each
    return starts


def _of_tokens(values: Any, length: int) -> Tensor | None:
    # Positions of images and videos have a third dimension and do not mark documents.
    if isinstance(values, Tensor) and values.ndim == 2 and values.shape[-1] == length:
        return values
    return None


def _tokens_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
        values = inputs.get(name)
        if isinstance(values, Tensor) and values.ndim > 1:
            return values.shape[0], values.shape[1]
    return None
