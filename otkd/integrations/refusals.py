"""Settings that the trainer refuses before it starts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from otkd.integrations.stored import (
    TEACHER_KEY,
    WithTeacher,
    has_features,
    may_carry_teacher,
)
from otkd.losses.protocol import as_loss
from otkd.losses.weighted import WeightedLoss

_CALL = ("labels", "mask", "num_items_in_batch")


def check_loss(loss: Any) -> None:
    """Raise ``TypeError`` unless ``loss`` is a module that can be called like a loss of otkd."""
    if not isinstance(loss, nn.Module):
        raise TypeError(f"loss must be an otkd loss module, got {type(loss).__name__}")
    parameters = inspect.signature(loss.forward).parameters
    named = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    missing = [name for name in _CALL if name not in parameters and not named]
    if missing:
        raise TypeError(
            f"loss must be an otkd loss, called as loss(student_logits, teacher_logits, "
            f"{'=, '.join(_CALL)}=), but {type(loss).__name__} takes no {', '.join(missing)}"
        )


def refuse_trained_loss(loss: nn.Module, purpose: str) -> None:
    """Raise ``ValueError`` for a loss with trainable parameters, which ``purpose`` cannot train."""
    if any(p.requires_grad for p in loss.parameters()):
        raise ValueError(
            f"{type(loss).__name__} has trainable parameters, which {purpose} would not train: use "
            "otkd.integrations.transformers.DistillationTrainer"
        )


def refuse_shared(student: nn.Module, teacher: nn.Module, loss: nn.Module) -> None:
    """Raise ``ValueError`` if training the student or the loss would change the teacher."""
    trained = [*student.parameters(), *loss.parameters()]
    trainable = {id(p) for p in trained if p.requires_grad}
    if teacher is student or any(id(p) in trainable for p in teacher.parameters()):
        raise ValueError(
            "the teacher is the student or shares trainable parameters with it or with the "
            "loss, so training would change it: pass a copy (copy.deepcopy, tensor.clone())"
        )


def refuse_training(
    args: Any,
    *,
    student: nn.Module,
    teachers: Sequence[nn.Module] | None,
    loss: nn.Module,
    train_dataset: Any,
    eval_dataset: Any,
    has_other_objective: bool,
) -> None:
    """Raise for settings with which something else would be trained than was asked for.

    Args:
        args: the ``TrainingArguments``.
        student: the model to train.
        teachers: the models that are only teachers; None if no teacher is a model.
        loss: the objective.
        train_dataset: with the stored teacher, if there is one.
        eval_dataset: likewise, or a dictionary of data sets.
        has_other_objective: whether a ``compute_loss_func`` was also passed.

    Raises:
        ValueError: see :class:`~otkd.integrations.transformers.DistillationTrainer`.
    """
    name = type(loss).__name__
    if args.label_smoothing_factor or has_other_objective:
        raise ValueError(
            "loss= is the whole objective, so label_smoothing_factor and compute_loss_func are "
            "not supported: use otkd.WeightedLoss for several terms"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: start one process "
            "per GPU with torchrun, or show one GPU with CUDA_VISIBLE_DEVICES"
        )
    protocol = as_loss(loss)
    if "none" in protocol.reductions:
        raise ValueError('reduction="none" does not return a scalar; use "mean" or "sum"')
    if args.world_size > 1 and any(p.requires_grad for p in loss.parameters()):
        raise ValueError(
            f"{name} has trainable parameters, which is supported in a single process only"
        )
    evaluated = eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]
    if args.world_size > 1:
        _refuse_uneven(
            args, stored=any(isinstance(x, WithTeacher) for x in (train_dataset, *evaluated))
        )
    if protocol.needs_features:
        if teachers is None and not has_features(train_dataset):
            raise ValueError(
                f"{name} compares features, which stored logits do not contain: pass the teacher "
                "as a model, or as DenseTeacher(logits, features)"
            )
        if any(isinstance(each, WithTeacher) and not has_features(each) for each in evaluated):
            raise ValueError(
                f"{name} compares features, which the eval_teacher does not contain: pass it as "
                "DenseTeacher(logits, features)"
            )
    if teachers is not None:
        for teacher in teachers:
            refuse_shared(student, teacher, loss)
    elif protocol.needs_teacher and not may_carry_teacher(train_dataset):
        raise ValueError(
            f"{name} needs a teacher: pass a model or stored logits as teacher=, or a "
            f"train_dataset whose examples have a {TEACHER_KEY!r} entry"
        )


def refuse_two_tokenizers(loss: nn.Module, teacher: Any, student_tokenizer: Any) -> None:
    """Raise ``ValueError`` for what cannot be compared if the teacher has its own tokenizer."""
    if student_tokenizer is None:
        raise ValueError(
            "with teacher_tokenizer=, pass the tokenizer of the student as processing_class="
        )
    if isinstance(teacher, str):
        raise ValueError(
            f"teacher={teacher!r} is the student itself, which has one tokenizer: leave "
            "teacher_tokenizer out"
        )
    for each in _terms(loss):
        needs = as_loss(each)
        if needs.needs_features or (needs.needs_teacher and not needs.bridges_vocabularies):
            raise ValueError(
                f"{type(each).__name__} compares the same tokens or features of student and "
                "teacher, but the teacher has its own tokenizer. Use PushforwardLoss(token_map, "
                "loss) or HybridLogitLoss(token_map) with otkd.alignment.token_map("
                "student_tokenizer, teacher_tokenizer), UniversalLogitLoss(), or SinkhornLoss(cost)"
                " or TransportKLLoss(cost) with otkd.alignment.aligned_cost or prefix_cost. If "
                "both tokenizers are the same, leave teacher_tokenizer out"
            )


def _terms(loss: nn.Module) -> list[nn.Module]:
    if not isinstance(loss, WeightedLoss):
        return [loss]
    return [inner for term in loss.terms.values() for inner in _terms(term)]


def _refuse_uneven(args: Any, *, stored: bool) -> None:
    """Raise ``ValueError`` for batch settings that leave a process without its part."""
    config = args.accelerator_config
    if not config.even_batches and not args.dataloader_drop_last:
        raise ValueError(
            "even_batches=False gives the processes different numbers of batches, and those with "
            "more would wait forever: set dataloader_drop_last=True, or leave even_batches on"
        )
    if config.dispatch_batches and stored:
        raise ValueError(
            "dispatch_batches=True sends only tensors to the other processes, and not a stored "
            f"teacher: leave it out, or give each example a {TEACHER_KEY!r} entry"
        )
