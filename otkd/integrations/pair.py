"""The outputs of student and teacher that a loss compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from otkd.checks import as_class_labels
from otkd.integrations.batches import label_key, without_labels
from otkd.integrations.model_refusals import (
    check_tokens,
    fewer_tokens,
    refuse_model,
    refuse_pair,
)
from otkd.integrations.models import ModelDescription, describe, own_inputs
from otkd.integrations.outputs import auxiliary_loss, read_outputs
from otkd.integrations.stored import TEACHER_KEY
from otkd.losses.protocol import as_loss
from otkd.teachers import TopKTeacher, teacher_logits_of
from otkd.teachers.protocol import teacher_features_of


class Pair:
    """A student and its teacher, described and checked, and how their outputs are read.

    Args:
        student: the model that is trained.
        teacher: a model, or None if teacher logits are part of the batches.
        loss: decides whether features are read besides logits.
        shift: see :class:`~otkd.integrations.transformers.DistillationTrainer`.
        label_names: the entries of a batch that are labels, which models do not get.

    Raises:
        ValueError: for models that cannot be trained, or cannot be the teacher of the other.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: nn.Module,
        *,
        shift: bool | None,
        label_names: Sequence[str],
    ) -> None:
        self.student = describe(student)
        refuse_model(self.student, "student")
        self.teacher_model = teacher
        self.teacher: ModelDescription | None = None
        self._vocabularies_differ = False
        if teacher is not None:
            self.teacher = describe(teacher)
            refuse_model(self.teacher, "teacher")
            refuse_pair(self.student, self.teacher, loss, shift=shift)
            self._vocabularies_differ = fewer_tokens(self.student, self.teacher) is not None
        self.needs_features = as_loss(loss).needs_features
        self.label_names = label_names

    def columns(self) -> set[str]:
        """The entries of an example that one of the two models reads."""
        own = self.teacher.arguments if self.teacher is not None else ()
        return {*self.student.arguments, *own}

    def student_outputs(
        self, model: nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Logits, and features if the loss needs them; and the auxiliary loss of the model."""
        other = () if self.teacher is None else self.teacher.arguments
        outputs = model(**self._inputs(model, self.student, inputs, other))
        read = read_outputs(outputs, self.student, "student", features=self.needs_features)
        return read, auxiliary_loss(outputs, self.student)

    def teacher_outputs(
        self, inputs: Mapping[str, Any], device: torch.device
    ) -> dict[str, Any] | None:
        """Logits, and features if the loss needs them; None if there is no teacher."""
        if TEACHER_KEY in inputs:
            return self._stored_outputs(inputs[TEACHER_KEY], device)
        model, own = self.teacher_model, self.teacher
        if model is None or own is None:
            return None
        if self._vocabularies_differ and "input_ids" in inputs:
            check_tokens(self.student, own, inputs["input_ids"])
        model.eval()
        share = self._inputs(model, own, inputs, self.student.arguments)
        if "use_cache" in own.arguments:
            share["use_cache"] = False
        with torch.no_grad():
            outputs = model(**share)
            return read_outputs(outputs, own, "teacher", features=self.needs_features)

    def _stored_outputs(self, stored: Any, device: torch.device) -> dict[str, Any]:
        if isinstance(stored, TopKTeacher):
            return {"logits": stored.to(device)}
        outputs = {"logits": teacher_logits_of(stored, device)}
        features = teacher_features_of(stored, device)
        if features is not None and self.needs_features:
            outputs["features"] = features
        return outputs

    def _inputs(
        self, model: nn.Module, own: ModelDescription, inputs: Mapping[str, Any], other: Any
    ) -> dict[str, Any]:
        key = label_key(inputs, self.label_names)
        share = own_inputs(
            model,
            own,
            without_labels(inputs, self.label_names),
            other=other,
            labels=None if key is None else as_class_labels(inputs[key]),
        )
        if self.needs_features:
            share["output_hidden_states"] = True
        return share
