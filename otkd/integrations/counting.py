"""Counted positions and sequences of an optimiser step, in all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from otkd.integrations.aligning import ALIGNED_KEY
from otkd.losses.at_positions import is_counted
from otkd.reductions import IGNORE_INDEX, ItemCounts, count_items


@dataclass(frozen=True)
class StepItems:
    """The counted items of a step, before a model has seen its microbatches.

    Without labels the items depend on the logits: they are the tokens of the mask, or the examples
    if each example has one row of logits.

    Attributes:
        token_level: the items if each token has logits.
        example_level: the items if each example has one row of logits.
        common: those at which a teacher with its own tokenizer is known.
        tokens_unknown: whether the inputs do not show how many tokens an example has; all examples
            are then taken to have as many as the logits.
    """

    token_level: ItemCounts
    example_level: ItemCounts
    common: ItemCounts
    tokens_unknown: bool = False

    def of(self, logits: Tensor) -> ItemCounts:
        """The items of a step, given the logits that the loss gets."""
        if logits.ndim <= 2:
            return self.example_level
        if not self.tokens_unknown:
            return self.token_level
        positions = self.example_level.positions * logits.shape[1:-1].numel()
        return ItemCounts(positions, self.example_level.sequences)


def step_items(
    microbatches: Sequence[tuple[Mapping[str, Any], Tensor | None, Tensor | None]],
    *,
    shift: bool,
    device: torch.device,
    accelerator: Accelerator,
    average_tokens: bool,
    replicas: int,
) -> StepItems:
    """The items of a step; every process must call this.

    Args:
        microbatches: the inputs of each, with its labels and mask as the loss gets them.
        shift: whether the logits are paired with the next token.
        device: of the counts.
        accelerator: of the trainer.
        average_tokens: whether the items of all processes have the same weight. If not, all
            processes that count something have the same weight.
        replicas: how many processes see the same batch.
    """
    counts = [_items(inputs, labels, mask, shift) for inputs, labels, mask in microbatches]
    own = torch.zeros(6, dtype=torch.long, device=device)
    for count in counts:
        own += count.to(device)
    total = own
    if accelerator.num_processes > 1:
        everywhere = cast("Tensor", accelerator.gather(own.unsqueeze(0)))
        total = everywhere.sum(0) if average_tokens else own * (everywhere > 0).sum(0)
    total = total / replicas
    unknown = any(
        labels is None and mask is None and _everywhere(inputs, shift) is None
        for inputs, labels, mask in microbatches
    )
    tokens, examples, common = (ItemCounts(*pair) for pair in total.split(2))
    return StepItems(tokens, examples, common, unknown)


def _items(
    inputs: Mapping[str, Any], labels: Tensor | None, mask: Tensor | None, shift: bool
) -> Tensor:
    """Positions and sequences of a microbatch, ``(6,)``, as in :class:`StepItems`."""
    common = _common_items(inputs, labels, mask, shift)
    if labels is not None:
        return torch.cat([count_items(labels != IGNORE_INDEX).repeat(2), common])
    counted = mask if mask is not None else _everywhere(inputs, shift)
    examples = torch.tensor([find_batch_size(inputs) or 0] * 2)
    tokens = examples if counted is None else count_items(counted != 0)
    return torch.cat([tokens, examples.to(tokens.device), common.to(tokens.device)])


def _common_items(
    inputs: Mapping[str, Any], labels: Tensor | None, mask: Tensor | None, shift: bool
) -> Tensor:
    if ALIGNED_KEY not in inputs:
        return torch.zeros(2, dtype=torch.long, device=None if labels is None else labels.device)
    shifted = shift and inputs.get("shift_labels") is None
    length = inputs["input_ids"].shape[1] - shifted
    return count_items(is_counted(inputs[ALIGNED_KEY]["student"], length, labels, mask))


def _everywhere(inputs: Mapping[str, Any], shift: bool) -> Tensor | None:
    """Ones at every token that has logits, if the inputs show it."""
    for side in ("decoder_", ""):
        ids, embedded = inputs.get(f"{side}input_ids"), inputs.get(f"{side}inputs_embeds")
        tokens = embedded[..., 0] if ids is None and isinstance(embedded, Tensor) else ids
        if isinstance(tokens, Tensor):
            return torch.ones_like(tokens[..., 1:] if shift else tokens)
    return None


def counted_items(logits: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Counted positions and sequences of a batch, ``(2,)``, after a model has seen it."""
    if labels is not None:
        return count_items(labels != IGNORE_INDEX)
    if mask is not None:
        return count_items(mask != 0)
    return count_items(torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device))
