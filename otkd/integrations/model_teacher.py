"""A model, or a student without its adapters, as the teacher of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from otkd.integrations.adapters import base_model, refuse_base_model
from otkd.integrations.batches import label_key
from otkd.integrations.model_refusals import (
    check_tokens,
    refuse_model,
    refuse_pair,
    vocabularies,
)
from otkd.integrations.models import ModelDescription, describe, own_inputs
from otkd.integrations.outputs import read_outputs
from otkd.integrations.sharding import placed
from otkd.losses.protocol import as_loss


class Teacher(ABC):
    """One or several models that give the teacher's logits of a batch.

    Attributes:
        models: those that are only teachers.
        arguments: the inputs that they name.
        shifts: whether their logits are for the label of the next position.
    """

    models: Sequence[nn.Module]
    arguments: frozenset[str]
    shifts: bool

    @abstractmethod
    def place(self, accelerator: Accelerator) -> None:
        """Move the models to the devices of the training; see :func:`placed`."""

    @abstractmethod
    def outputs(
        self, inputs: Mapping[str, Any], student: nn.Module, others: Collection[str]
    ) -> dict[str, Tensor]:
        """Logits, and features if the loss needs them, without gradient.

        Args:
            inputs: the batch.
            student: as it is trained, which may be wrapped.
            others: the inputs that models besides this teacher name.
        """


class ModelTeacher(Teacher):
    """A model; see :func:`as_teacher` for the arguments.

    Args:
        name: how messages call it if there are several.
    """

    def __init__(
        self,
        model: nn.Module,
        student: ModelDescription,
        loss: nn.Module,
        *,
        shift: bool | None,
        label_names: Sequence[str],
        own_tokens: bool = False,
        name: str = "",
    ) -> None:
        self.models = [model]
        self.description = describe(model)
        self.arguments = self.description.arguments
        self.shifts = self.description.shifts
        named = replace(self.description, name=f"{self.description.name}{name}")
        refuse_model(named, "teacher")
        refuse_pair(student, named, loss, shift=shift, own_tokens=own_tokens)
        self._student = student
        self._differ = not own_tokens and bool(vocabularies(student, self.description))
        self._label_names = label_names
        self._needs_features = as_loss(loss).needs_features

    def place(self, accelerator: Accelerator) -> None:  # noqa: D102
        self.models = [placed(model, accelerator) for model in self.models]

    def outputs(  # noqa: D102
        self, inputs: Mapping[str, Any], student: nn.Module, others: Collection[str]
    ) -> dict[str, Tensor]:
        (model,) = self.models
        if self._differ:
            key = label_key(inputs, self._label_names)
            labels = None if key is None else inputs[key]
            check_tokens(self._student, self.description, inputs.get("input_ids"), labels)
        model.eval()
        return self._run(model, inputs, others)

    def _run(
        self, model: nn.Module, inputs: Mapping[str, Any], others: Collection[str]
    ) -> dict[str, Tensor]:
        share = own_inputs(
            model,
            self.description,
            inputs,
            others=others,
            label_names=self._label_names,
            hidden_states=self._needs_features,
        )
        with torch.no_grad():
            found = model(**share)
            return read_outputs(found, self.description, "teacher", features=self._needs_features)


class BaseModelTeacher(ModelTeacher):
    """The student without its adapters."""

    def __init__(
        self, model: nn.Module, student: ModelDescription, loss: nn.Module, **options: Any
    ) -> None:
        refuse_base_model(model)
        super().__init__(model, student, loss, **options)
        self.models = []

    def outputs(  # noqa: D102
        self, inputs: Mapping[str, Any], student: nn.Module, others: Collection[str]
    ) -> dict[str, Tensor]:
        with base_model(student):
            return self._run(student, inputs, others)
