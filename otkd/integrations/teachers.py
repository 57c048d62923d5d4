"""The teacher of a student that was given to a trainer, which may be several models."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from otkd.integrations.adapters import BASE_MODEL
from otkd.integrations.model_teacher import BaseModelTeacher, ModelTeacher, Teacher
from otkd.integrations.models import ModelDescription
from otkd.integrations.packing import PACKED_KEY
from otkd.integrations.selection import of_examples
from otkd.integrations.sharding import shards
from otkd.integrations.stored import TEACHER_INDEX
from otkd.losses.protocol import as_loss
from otkd.losses.settings import teacher_scale
from otkd.precision import compute_dtype


def runs(teacher: Any) -> bool:
    """Whether a teacher is one or several models, and not what they once returned."""
    return isinstance(teacher, nn.Module | list | tuple) or teacher == BASE_MODEL


def as_teacher(
    teacher: Any,
    weights: Sequence[float] | None,
    student: nn.Module,
    description: ModelDescription,
    loss: nn.Module,
    **options: Any,
) -> Teacher | None:
    """The teacher of ``student`` that was given to a trainer.

    Args:
        teacher: a model, several of them, or ``"base_model"``, the student without its adapters;
            None if there is none.
        weights: of a mixture of several teachers; None for one per example.
        student: the model that is trained.
        description: of the student.
        loss: that reads the teacher.
        **options: ``shift`` and ``label_names`` of the trainer, and ``own_tokens`` of the pair.

    Raises:
        TypeError: if a teacher is not a model.
        ValueError: for models that cannot be the teacher of the student; for several teachers of
            different vocabularies; for weights that are not those of a mixture.
    """
    several = isinstance(teacher, list | tuple)
    if weights is not None and not several:
        raise ValueError("teacher_weights= are those of several models: pass them as teacher=[…]")
    if teacher is None:
        return None
    if isinstance(teacher, str):
        return BaseModelTeacher(student, description, loss, **options)
    if not several:
        return ModelTeacher(teacher, description, loss, **options)
    if not teacher or not all(isinstance(each, nn.Module) for each in teacher):
        kinds = ", ".join(type(each).__name__ for each in teacher) or "none"
        raise TypeError(f"several teachers must be models, got {kinds}")
    teachers = [
        ModelTeacher(each, description, loss, name=f" (teacher {number})", **options)
        for number, each in enumerate(teacher)
    ]
    if weights is None:
        return TeacherPerExample(teachers)
    return MixtureTeacher(teachers, weights, loss)


class _SeveralTeachers(Teacher):
    """Several models, which run one after the other."""

    def __init__(self, teachers: Sequence[ModelTeacher]) -> None:
        self._teachers = teachers
        self.models = [model for teacher in teachers for model in teacher.models]
        self.arguments = frozenset().union(*(teacher.arguments for teacher in teachers))
        self.shifts = teachers[0].shifts
        if any(teacher.shifts != self.shifts for teacher in teachers):
            raise ValueError(
                "several teachers must predict the same token at a position, but some of them are "
                "causal language models and others are not"
            )
        self._sharded = False

    def place(self, accelerator: Accelerator) -> None:
        for teacher in self._teachers:
            teacher.place(accelerator)
        self.models = [model for teacher in self._teachers for model in teacher.models]
        self._sharded = shards(accelerator)


class MixtureTeacher(_SeveralTeachers):
    """A weighted mean of the distributions of several teachers.

    At the temperature T at which the loss reads its teacher, the mixture is Σₖ wₖ softmax(zₖ/T),
    the mean of the tempered distributions. Its logits are T·log Σₖ wₖ softmax(zₖ/T). The teachers
    run one after the other, so the memory does not depend on their number.
    """

    def __init__(
        self, teachers: Sequence[ModelTeacher], weights: Sequence[float], loss: nn.Module
    ) -> None:
        _check_weights(weights, len(teachers))
        _, vocab_size = teacher_scale(loss)
        if vocab_size is None:
            _check_targets(teachers)
        if as_loss(loss).needs_features:
            raise ValueError(
                f"{type(loss).__name__} compares features, of which there is no mixture: use one "
                f"teacher, or one per example ({TEACHER_INDEX!r})"
            )
        super().__init__(teachers)
        self._weights, self._loss = weights, loss

    def outputs(  # noqa: D102
        self, inputs: Mapping[str, Any], student: nn.Module, others: Collection[str]
    ) -> dict[str, Tensor]:
        # Read at every step, because a callback may change the temperature.
        temperature, vocab_size = teacher_scale(self._loss)
        mixed = None
        for teacher, weight in zip(self._teachers, self._weights, strict=True):
            logits = teacher.outputs(inputs, student, {*others, *self.arguments})["logits"]
            scaled = logits[..., :vocab_size].to(compute_dtype(logits)) / temperature
            del logits
            term = scaled.log_softmax(-1).add_(math.log(weight))
            if mixed is None:
                mixed = term
                continue
            _check_same_vocabulary(mixed, term)
            mixed = torch.logaddexp(mixed, term, out=mixed)
        assert mixed is not None
        return {"logits": mixed.mul_(temperature)}


class TeacherPerExample(_SeveralTeachers):
    """Several teachers, of which each example has one: its ``teacher_index``.

    Only the examples of a teacher run through it.
    """

    def __init__(self, teachers: Sequence[ModelTeacher]) -> None:
        _check_targets(teachers)
        super().__init__(teachers)

    def outputs(  # noqa: D102
        self, inputs: Mapping[str, Any], student: nn.Module, others: Collection[str]
    ) -> dict[str, Tensor]:
        index = _checked_index(inputs.get(TEACHER_INDEX), len(self._teachers))
        inputs = {name: value for name, value in inputs.items() if name != TEACHER_INDEX}
        dimension = 1 if PACKED_KEY in inputs else 0
        parts, places = [], []
        for number, teacher in enumerate(self._teachers):
            chosen = index == number
            idle = not chosen.any()
            if idle and not self._sharded:
                continue
            # Processes that share the parameters of a teacher must run it equally often.
            chosen[0] |= idle
            part, place = of_examples(inputs, chosen)
            outputs = teacher.outputs(part, student, {*others, *self.arguments})
            if not idle:
                parts.append(outputs)
                places.append(place)
        order = torch.cat(places).argsort()
        for part in parts[1:]:
            _check_same_vocabulary(parts[0]["logits"], part["logits"])
        return {
            name: torch.cat([part[name] for part in parts], dimension).index_select(
                dimension, order
            )
            for name in parts[0]
        }


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"teacher_weights must be {count} positive numbers, one per teacher, got "
            f"{list(weights)}"
        )
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(
            f"teacher_weights must add up to 1, so that the mixture is a distribution, got "
            f"{list(weights)}, which add up to {sum(weights):g}"
        )


def _check_targets(teachers: Sequence[ModelTeacher]) -> None:
    sizes = {t.description.targets for t in teachers} - {None}
    if len(sizes) > 1:
        named = ", ".join(
            f"{teacher.description.name} (teacher {number}) predicts {teacher.description.targets}"
            for number, teacher in enumerate(teachers)
        )
        raise ValueError(
            f"several teachers must predict the same vocabulary, but {named} tokens: if the "
            "tokenizer is the same and one is only padded, use resize_token_embeddings, or for a "
            "mixture pass vocab_size= to the loss"
        )


def _check_same_vocabulary(one: Tensor, other: Tensor) -> None:
    if one.shape[-1] != other.shape[-1]:
        raise ValueError(
            "several teachers must predict the same classes or tokens, but one returns "
            f"{one.shape[-1]} logits and another {other.shape[-1]}"
        )


def _checked_index(index: Any, count: int) -> Tensor:
    if index is None:
        raise ValueError(
            f"the batch has no {TEACHER_INDEX!r}, which says which of the {count} teachers an "
            f"example has: give each example one, from 0 to {count - 1}, or pass teacher_weights= "
            "for a mixture"
        )
    if not isinstance(index, Tensor) or index.ndim != 1 or index.is_floating_point():
        raise TypeError(f"{TEACHER_INDEX!r} must be one whole number per example, got {index!r}")
    wrong = index[(index < 0) | (index >= count)]
    if len(wrong):
        raise ValueError(
            f"{TEACHER_INDEX!r} must be from 0 to {count - 1}, one of {count} teachers, got "
            f"{int(wrong[0])}"
        )
    return index
