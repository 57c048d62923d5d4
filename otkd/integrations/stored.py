"""A stored teacher with a data set: each example carries its row, each batch its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from otkd.integrations.aligning import ALIGNED_KEY, Aligner, at_common_positions
from otkd.integrations.packing import (
    PACKED_KEY,
    packed_lengths,
    packed_teacher,
    with_length,
)
from otkd.teachers import DenseTeacher, StoredTeacher, TopKTeacher

TEACHER_KEY = "teacher_logits"
TEACHER_INDEX = "teacher_index"


@dataclass(frozen=True)
class TeacherRow:
    """One example of a stored teacher; it is read together with its whole batch."""

    teacher: StoredTeacher
    index: int


class WithTeacher(Dataset):
    """A map-style data set of dictionaries with a stored teacher as ``teacher_logits``.

    Args:
        dataset: the examples, in the order of the stored teacher.
        teacher: one entry per example.
        name: name of the data set in error messages.

    Raises:
        ValueError: if the data set has no length, or another length than the stored teacher.
    """

    def __init__(self, dataset: Any, teacher: StoredTeacher, name: str = "train_dataset") -> None:
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"a stored teacher needs a {name} with a length and a fixed order, "
                f"got {type(dataset).__name__}"
            )
        if len(teacher) != len(dataset):
            raise ValueError(
                f"the stored teacher has {len(teacher)} entries and the {name} {len(dataset)} "
                "examples; it must have one entry per example, in the same order"
            )
        self.dataset = dataset
        self.teacher = teacher

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], TEACHER_KEY: TeacherRow(self.teacher, index)}


class TeacherCollator:
    """Collates with ``inner``; ``teacher_logits`` and ``teacher_index`` are carried past it.

    Rows of a stored teacher become the stored teacher of the batch. Tensors, arrays and lists of
    logits become one tensor, padded along the sequence with NaN, which a loss refuses at counted
    positions. If ``inner`` packs the examples into one row, the stored teacher is packed in the
    same way, and the batch has the lengths of the examples as ``packed_lengths``.

    Args:
        inner: collates the other entries.
        aligner: of a teacher with its own tokenizer. The stored teacher of the batch is then that
            at the common positions.

    Raises:
        ValueError: in a call, if token-level logits do not match a batch padded on the left.
    """

    def __init__(self, inner: Callable[[list], Any], aligner: Aligner | None = None) -> None:
        self.inner = inner
        self.aligner = aligner
        # Trainer saves the tokenizer of its collator.
        self.tokenizer = getattr(inner, "tokenizer", None)

    def __call__(self, features: list) -> Any:
        """The batch of ``inner``, with its part of the teacher as ``teacher_logits``."""
        if not isinstance(features[0], Mapping):
            return self.inner(features)
        features = [dict(feature) for feature in features]
        examples = None if self.aligner is None else self.aligner.examples(features)
        ids = [feature.get("input_ids") for feature in features]
        stored = TEACHER_KEY in features[0]
        rows = [feature.pop(TEACHER_KEY) for feature in features] if stored else []
        indexed = TEACHER_INDEX in features[0]
        index = [feature.pop(TEACHER_INDEX) for feature in features] if indexed else []
        batch = self.inner(features)
        if indexed:
            batch[TEACHER_INDEX] = torch.as_tensor(index)
        lengths = packed_lengths(ids, batch)
        if lengths is not None:
            batch[PACKED_KEY] = lengths
        if self.aligner is not None and examples is not None:
            batch[ALIGNED_KEY] = self.aligner.entry(examples, batch, self.inner)
        if stored and examples is not None:
            packed = lengths is not None
            batch[TEACHER_KEY] = at_common_positions(_stacked(rows), examples, packed=packed)
        elif stored:
            teacher = _stacked(rows)
            batch[TEACHER_KEY] = teacher if lengths is None else packed_teacher(teacher, lengths)
            _refuse_left_padding(batch.get("attention_mask"), rows)
        return batch


def _stacked(rows: Sequence[Any]) -> Any:
    if isinstance(rows[0], TeacherRow):
        return rows[0].teacher[torch.tensor([row.index for row in rows])]
    tensors = [torch.as_tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=float("nan"))


def _refuse_left_padding(attention_mask: Any, rows: Sequence[Any]) -> None:
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return
    if attention_mask[:, 0].all():
        return
    if isinstance(rows[0], TeacherRow):
        # All entries have the same length. Only one is expanded, because expanding is costly.
        row = rows[0].teacher[rows[0].index]
        rows = [row.without_logits() if isinstance(row, TopKTeacher) else row.logits()]
    length = attention_mask.shape[1]
    for logits in map(torch.as_tensor, rows):
        if logits.ndim == 2 and logits.shape[0] != length:
            raise ValueError(
                f"the batch is padded on the left to {length} tokens, but the stored teacher has "
                f"{logits.shape[0]}, so the positions do not match: pad on the right, or store the "
                "teacher at the padded length"
            )


def fit_length(
    teacher_logits: Tensor | TopKTeacher, student_logits: Tensor
) -> Tensor | TopKTeacher:
    """Crop token-level teacher logits to the student's length, or pad them with NaN.

    Stored logits are padded to the longest example or by the teacher's own padding, and a batch to
    its longest example.
    """
    if len(teacher_logits.shape) != 3 or student_logits.ndim != 3:
        return teacher_logits
    return with_length(teacher_logits, student_logits.shape[1])


def may_carry_teacher(dataset: Any) -> bool:
    """Whether examples have a ``teacher_logits`` entry, or may have one."""
    if dataset is None:
        return False
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        return TEACHER_KEY in columns
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        return True  # a stream: unknown before the first batch
    return TEACHER_KEY in dataset[0]


def has_features(dataset: Any) -> bool:
    """Whether a data set has a stored teacher with features."""
    return (
        isinstance(dataset, WithTeacher) and getattr(dataset.teacher, "features", None) is not None
    )


def as_stored_teacher(teacher: Any) -> StoredTeacher:
    """Stored logits as a stored teacher.

    Raises:
        TypeError: if ``teacher`` is neither a tensor nor a stored teacher.
    """
    if isinstance(teacher, Tensor):
        return DenseTeacher(teacher)
    if isinstance(teacher, StoredTeacher) and not isinstance(teacher, nn.Module):
        return teacher
    raise TypeError(
        'teacher must be a model, several models, "base_model" or stored logits (a tensor or a '
        f"StoredTeacher), and eval_teacher stored logits, got {type(teacher).__name__}"
    )


def with_eval_teacher(dataset: Any, teacher: Any) -> Any:
    """A data set, or a dictionary of data sets, with its stored teacher or teachers, if any.

    Raises:
        ValueError: if a stored teacher has no data set, or one of another length.
    """
    if teacher is None:
        return dataset
    if not isinstance(teacher, Mapping):
        return WithTeacher(dataset, as_stored_teacher(teacher), "eval_dataset")
    if not isinstance(dataset, Mapping) or not teacher.keys() <= dataset.keys():
        raise ValueError(
            f"eval_teacher is a dictionary with the keys {sorted(teacher)}, so eval_dataset must "
            "be a dictionary with the same keys"
        )
    return dict(dataset) | {
        name: WithTeacher(dataset[name], as_stored_teacher(stored), f"eval_dataset {name!r}")
        for name, stored in teacher.items()
    }
