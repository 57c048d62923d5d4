"""A student and its teacher: from the entries of a batch to what a loss compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from otkd.integrations.aligning import ALIGNED_KEY
from otkd.integrations.batches import find_targets
from otkd.integrations.comparison import Comparison
from otkd.integrations.model_refusals import (
    check_has_positions,
    check_labels_of,
    check_positions_of,
    check_stored_rows,
    refuse_model,
)
from otkd.integrations.models import describe, own_inputs
from otkd.integrations.outputs import auxiliary_loss, read_outputs
from otkd.integrations.packing import PACKED_KEY
from otkd.integrations.stored import TEACHER_INDEX, TEACHER_KEY, fit_length
from otkd.integrations.teachers import as_teacher
from otkd.losses.at_positions import at_places
from otkd.losses.protocol import as_loss
from otkd.teachers import TopKTeacher, teacher_logits_of
from otkd.teachers.protocol import teacher_features_of


class Pair:
    """A student and its teacher, described and checked, and how their outputs are read.

    Args:
        student: the model that is trained.
        teacher: see :func:`~otkd.integrations.teachers.as_teacher`; None if teacher logits are part
            of the batches.
        loss: decides whether features are read besides logits.
        shift: see :class:`~otkd.integrations.transformers.DistillationTrainer`.
        label_names: the entries of a batch that are labels, which models do not get.
        teacher_weights: see :class:`~otkd.integrations.transformers.DistillationTrainer`.
        own_tokens: whether the teacher has its own tokenizer, and reads ``aligned`` in the batches.

    Raises:
        ValueError: for models that cannot be trained, or cannot be the teacher of the other.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        loss: nn.Module,
        *,
        shift: bool | None,
        label_names: Sequence[str],
        teacher_weights: Sequence[float] | None = None,
        own_tokens: bool = False,
    ) -> None:
        self.student = describe(student)
        refuse_model(self.student, "student")
        self.teacher = as_teacher(
            teacher,
            teacher_weights,
            student,
            self.student,
            loss,
            shift=shift,
            label_names=label_names,
            own_tokens=own_tokens,
        )
        self.needs_features = as_loss(loss).needs_features
        self._by_sequence = "sequence_mean" in as_loss(loss).reductions
        self.label_names = label_names
        if shift is None:
            # Logits of a module of one's own are for the same tokens as those of its teacher.
            known = self.student if self.student.task is not None else self.teacher
            shift = known is not None and known.shifts
        self.shift = shift
        if own_tokens and not shift:
            raise ValueError(
                "teacher_tokenizer= is for causal language models, whose logits are paired with "
                f"the next label: pass shift=True if the student {self.student.name} is one"
            )
        self._labels_seen = False

    @property
    def teacher_models(self) -> Sequence[nn.Module] | None:
        """The models that are only teachers; None if the teacher is no model."""
        return None if self.teacher is None else self.teacher.models

    def place_teacher(self, accelerator: Accelerator) -> None:
        """Move the teacher to the devices of the training, and shard it if the student is."""
        if self.teacher is not None:
            self.teacher.place(accelerator)

    def columns(self) -> set[str]:
        """The entries of an example that one of the models reads."""
        own = self.teacher.arguments if self.teacher is not None else ()
        return {*self.student.arguments, *own}

    def targets(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Labels, or without them the attention mask, aligned with the loss's logits."""
        return find_targets(
            inputs,
            shift=self.shift,
            mask_name=self.student.mask_name,
            label_names=self.label_names,
        )

    def compare(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        device: torch.device,
        autocast: AbstractContextManager,
    ) -> Comparison:
        """Run both models, and align and check their outputs, labels and mask.

        Args:
            model: the student as Trainer wrapped it.
            inputs: the batch.
            device: of the training; stored logits are moved to it.
            autocast: the precision in which the teacher runs.

        Raises:
            ValueError: if outputs, stored logits, labels and mask do not belong together.
        """
        if PACKED_KEY in inputs and self._by_sequence:
            raise ValueError(
                'the collator packs the examples into one row, and reduction="sequence_mean" would '
                'take it for one sequence: use "mean", or pad the examples'
            )
        labels, _ = self.targets(inputs)  # a wrong batch is refused before the models run
        if model.training and self.student.decodes:
            # Before the decoder's input is made from them.
            self._check_labels(labels, self.student.targets)
        # The teacher runs first, so that its activations are freed before the student's are stored.
        with autocast:
            teacher = self.teacher_outputs(inputs, device, model)
        return self.align(inputs, self._student_outputs(model, inputs), teacher)

    def align(
        self, inputs: Mapping[str, Any], outputs: Any, teacher: dict[str, Any] | None
    ) -> Comparison:
        """Align and check the outputs of both models, labels and mask.

        Args:
            inputs: the batch.
            outputs: of the student.
            teacher: see :meth:`teacher_outputs`.

        Raises:
            ValueError: if outputs, stored logits, labels and mask do not belong together.
        """
        labels, mask = self.targets(inputs)
        student: Mapping[str, Tensor] = read_outputs(
            outputs, self.student, "student", features=self.needs_features
        )
        predictions = student["logits"]
        aligned = inputs.get(ALIGNED_KEY)
        if teacher is not None and TEACHER_KEY in inputs and aligned is None:
            check_stored_rows(teacher["logits"].shape, predictions.shape)
            teacher = {name: fit_length(x, predictions) for name, x in teacher.items()}
        if self.shift and inputs.get("shift_labels") is None:
            check_has_positions(self.student, predictions)
            student = {name: values[:, :-1] for name, values in student.items()}
            if aligned is None:
                teacher = teacher and {name: values[:, :-1] for name, values in teacher.items()}
        check_positions_of(self.student, student["logits"], labels, mask)
        self._check_labels(labels, predictions.shape[-1])
        self._labels_seen = True
        # A mask over tokens does not apply to the single row of logits of a classifier.
        mask = mask if predictions.ndim > 2 else None
        auxiliary = auxiliary_loss(outputs, self.student)
        places = None if aligned is None else aligned["student"].to(predictions.device)
        return Comparison(student, teacher, labels, mask, predictions, auxiliary, places)

    def _check_labels(self, labels: Tensor | None, classes: int | None) -> None:
        if labels is not None and classes is not None:
            # Synchronise the device in the first batch only.
            check_labels_of(self.student, labels if self._labels_seen else labels.cpu(), classes)

    def _student_outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        share = own_inputs(
            model,
            self.student,
            inputs,
            others=() if self.teacher is None else self.teacher.arguments,
            label_names=self.label_names,
            hidden_states=self.needs_features,
        )
        return model(**share)

    def teacher_outputs(
        self, inputs: Mapping[str, Any], device: torch.device, student: nn.Module
    ) -> dict[str, Any] | None:
        """Logits of the teacher, and features if the loss needs them; None without a teacher."""
        if TEACHER_KEY in inputs:
            return self._stored_outputs(inputs[TEACHER_KEY], device)
        if self.teacher is None:
            return None
        aligned = inputs.get(ALIGNED_KEY)
        if aligned is None:
            return self.teacher.outputs(inputs, student, self.student.arguments)
        own = {name: inputs[name] for name in (TEACHER_INDEX,) if name in inputs}
        named = aligned["inputs"].keys()
        outputs = self.teacher.outputs({**aligned["inputs"], **own}, student, named)
        places = aligned["teacher"]
        return {name: at_places(x, places.to(x.device)) for name, x in outputs.items()}

    def _stored_outputs(self, stored: Any, device: torch.device) -> dict[str, Any]:
        if isinstance(stored, TopKTeacher):
            return {"logits": stored.to(device)}
        outputs = {"logits": teacher_logits_of(stored, device)}
        features = teacher_features_of(stored, device)
        if features is not None and self.needs_features:
            outputs["features"] = features
        return outputs
