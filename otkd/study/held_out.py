"""Encoded texts in batches: predictions of a student beside a teacher's, and a teacher's states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otkd.integrations.batches import find_targets
from otkd.reductions import IGNORE_INDEX
from otkd.study.messages import StudyError, notice
from otkd.study.prediction import autocast
from otkd.study.states import StoredStates
from otkd.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from otkd.teachers import StoredTeacher

_BATCH = 8
_SHARD = 16  # batches that are stored at once, so that an interrupted teacher continues
# Of logits computed from states, relative to the largest.
_TOLERANCE = 1e-3


class HeldOut:
    """Encoded rows in batches of similar length, to compare the predictions with a teacher."""

    def __init__(self, rows: Dataset, collate: Any, *, bf16: bool) -> None:
        self._rows, self._bf16 = len(rows), bf16
        lengths = torch.tensor(rows["length"][:])
        order = torch.argsort(lengths, descending=True, stable=True).split(_BATCH)
        rows = rows.remove_columns("length")
        self._batches = [(index, collate([*rows.select(index.tolist())])) for index in order]

    def __len__(self) -> int:
        return self._rows

    def _unrun(self) -> Iterator[tuple]:
        return ((index, batch, None) for index, batch in self._batches)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @torch.no_grad()
    def run(
        self,
        model: PreTrainedModel,
        *,
        states: bool = False,
        exact: bool = False,
        part: slice = slice(None),
    ) -> Iterator[tuple]:
        """The places of each batch, the batch, and the logits or the last hidden states.

        Args:
            model: that reads the batches.
            states: yield the states instead of the logits.
            exact: compute in float32, also if students are run in bf16.
            part: the batches.
        """
        was_training = model.training
        model.eval()
        try:
            for index, batch in self._batches[part]:
                inputs = {
                    name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")
                }
                with autocast(model.device, self._bf16 and not exact):
                    run: Any = model.base_model if states else model
                    outputs = run(**inputs, use_cache=False)
                yield index, batch, outputs.last_hidden_state if states else outputs.logits
        finally:
            model.train(was_training)

    def compared(
        self, model: PreTrainedModel | None, teacher: StoredTeacher
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits of student and teacher, and the labels, at the positions of each batch that count.

        Without a student, the teacher is compared with itself.

        Raises:
            FloatingPointError: if a logit of the student is not finite.
        """
        every = self._unrun() if model is None else self.run(model)
        for index, batch, ours in every:
            labels, _ = find_targets(batch, shift=True, mask_name="attention_mask")
            assert labels is not None
            device = labels.device if model is None else model.device
            labels = labels.to(device)
            theirs = teacher[index].to(device).logits()[:, : labels.shape[1]]
            counted = labels != IGNORE_INDEX
            ours = theirs[counted] if model is None else ours[:, :-1][counted].float()
            if not ours.isfinite().all():
                raise FloatingPointError("the logits on the development rows are not finite")
            yield ours, theirs[counted], labels[counted]


def check_linear(model: PreTrainedModel, rows: HeldOut) -> None:
    """Check that the logits of a model are its output head of its last hidden states.

    Raises:
        StudyError: if they are not.
    """
    part = slice(0, 1)
    (_, batch, states), (_, _, logits) = (
        next(rows.run(model, states=each, exact=True, part=part)) for each in (True, False)
    )
    head: Any = model.get_output_embeddings()
    read = batch["attention_mask"].bool().to(logits.device)
    with torch.no_grad():
        gap = (head(states)[read] - logits[read]).abs().max()
    if gap > _TOLERANCE * logits[read].abs().max():
        raise StudyError(
            f"The logits of {type(model).__name__} are not a linear function of its last hidden "
            "states, which a study stores; soft-capping is a frequent reason. Choose another "
            "teacher."
        )


def stored_states(
    model: PreTrainedModel, rows: HeldOut, shards: Path, on_steps: Callable[[int], None]
) -> StoredStates:
    """The teacher's last hidden states on all rows, with its output head.

    Args:
        model: the teacher.
        rows: that it reads.
        shards: the start of the names of files in which an interrupted computation is continued.
        on_steps: counts the batches.
    """
    states: dict[int, Tensor] = {}
    for start in range(0, rows.batches, _SHARD):
        path = shards.with_name(f"{shards.name}-{start}.safetensors")
        found = _read_shard(path)
        if found is None:
            part = slice(start, start + _SHARD)
            found = _states(rows.run(model, states=True, exact=True, part=part), on_steps)
            save_tensors(path, {str(place): text for place, text in found.items()})
        else:
            on_steps(min(_SHARD, rows.batches - start))
        states |= found
    head: Any = model.get_output_embeddings()
    weight = head.weight.detach().cpu()
    bias = None if head.bias is None else head.bias.detach().cpu()
    return StoredStates.of([states[place] for place in range(len(rows))], weight, bias)


def _states(batches: Iterator[tuple], on_steps: Callable[[int], None]) -> dict[int, Tensor]:
    """The states ``(length, width)`` of every text by its place."""
    states = {}
    for index, batch, found in batches:
        if not found.isfinite().all():
            raise FloatingPointError("the teacher's states are not finite")
        lengths = batch["attention_mask"].sum(-1).tolist()
        for place, text, length in zip(index.tolist(), found.float().cpu(), lengths, strict=True):
            states[place] = text[:length].clone()
        on_steps(1)
    return states


def _read_shard(path: Path) -> dict[int, Tensor] | None:
    """The states in a file of an interrupted command, or None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        return {int(place): text for place, text in load_tensors(path)[0].items()}
    except ValueError as error:
        notice(f"{error}; these states are computed again.")
        return None
