"""An otkd loss as the ``compute_loss_func`` of an unchanged ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from otkd.integrations.pair import Pair
from otkd.integrations.refusals import check_loss, refuse_shared, refuse_trained_loss
from otkd.losses.protocol import as_loss


def compute_loss_func(
    loss: nn.Module, teacher: nn.Module, *, student: nn.Module
) -> Callable[..., Tensor]:
    """The loss against a teacher, for ``Trainer(model=student, compute_loss_func=…)``.

    Trainer passes its function the outputs of the model and the labels, but not the inputs, which
    the teacher needs. A hook on the student therefore keeps the inputs of its last forward pass.
    The teacher runs on them without gradient and without autocast, in its own precision.

    Logits, labels and packed documents are aligned as by
    :class:`~otkd.integrations.transformers.DistillationTrainer`, and the same models are refused.
    Trainer counts the labels of all microbatches and processes, so gradient accumulation adds up to
    the loss of the full batch. For some causal language models (GPT-2) and in older versions it
    also counts the first label of each row, which no position predicts, and the loss is smaller by
    that share: set that label to −100.

    Args:
        loss: an otkd loss with ``reduction="mean"`` or ``"sum"``; it is moved to the device of the
            logits.
        teacher: a model that takes the student's inputs and returns ``logits``; likewise, unless it
            has a device map.
        student: the model that is given to Trainer. Wrappers that Trainer adds do no harm.

    Returns:
        A function of ``(outputs, labels, num_items_in_batch)`` that returns a scalar. It raises
        ``ValueError`` for a batch without labels, for a student with an auxiliary loss, and if
        Trainer trains another model than ``student``.

    Raises:
        TypeError: if ``loss`` is not an otkd loss, or a model is not a module.
        ValueError: for a loss with another reduction, with trainable parameters, or between
            features; for models that DistillationTrainer refuses; if the teacher shares trainable
            parameters with the student.

    Example:
        >>> import otkd, torch, transformers
        >>> from otkd.integrations.transformers import compute_loss_func
        >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2,
        ...                                  bos_token_id=1, eos_token_id=2)
        >>> student, teacher = (transformers.GPT2LMHeadModel(config) for _ in range(2))
        >>> objective = compute_loss_func(otkd.KLLoss(), teacher, student=student)
        >>> ids = torch.tensor([[3, 4, 5]])
        >>> objective(student(input_ids=ids), ids).shape  # as Trainer does at each step
        torch.Size([])
    """
    check_loss(loss)
    for name, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{name} must be a model, got {type(model).__name__}. For a stored teacher use "
                "otkd.integrations.transformers.DistillationTrainer"
            )
    _refuse_loss(loss)
    refuse_shared(student, teacher, loss)
    return _Objective(loss, teacher, student)


def _refuse_loss(loss: nn.Module) -> None:
    protocol, name = as_loss(loss), type(loss).__name__
    refuse_trained_loss(loss, "compute_loss_func")
    other = sorted(protocol.reductions - {"mean", "sum"})
    if other:
        raise ValueError(
            f'{name} has reduction="{other[0]}", but Trainer knows only the number of labels of a '
            'step, by which "mean" divides: use "mean" or "sum", or for "sequence_mean" '
            "otkd.integrations.transformers.DistillationTrainer"
        )
    if protocol.needs_features:
        raise ValueError(
            f"{name} compares features, which Trainer does not ask the model for: use "
            "otkd.integrations.transformers.DistillationTrainer"
        )


class _LastInputs:
    """A hook that keeps the arguments of a module's last forward pass until they are taken.

    It holds neither the loss nor the teacher, so that a copy of the student does not copy them.
    """

    def __init__(self) -> None:
        self._named: dict[str, Any] | None = None

    def __call__(self, module: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        self._named = named

    def take(self) -> dict[str, Any]:
        named, self._named = self._named, None
        if named is None:
            raise ValueError(
                "the student given to compute_loss_func was not run: it must be the model object "
                "that Trainer trains, not a copy of it or the result of model_init"
            )
        return named


class _Objective:
    def __init__(self, loss: nn.Module, teacher: nn.Module, student: nn.Module) -> None:
        self.loss, self.teacher, self._student = loss, teacher, student
        self._pair = Pair(student, teacher, loss, shift=None, label_names=())
        self._inputs = _LastInputs()
        student.register_forward_pre_hook(self._inputs, with_kwargs=True)

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        inputs = self._inputs.take()
        if labels is None:
            raise ValueError(
                "the batch has no labels, from which Trainer counts the items of a step: give each "
                "example labels, with -100 where a position does not count"
            )
        device = labels.device
        self.loss.to(device)
        if getattr(self.teacher, "hf_device_map", None) is None:
            self.teacher.to(device)
        batch = {**inputs, "labels": labels}
        batch.pop("num_items_in_batch", None)  # Trainer adds it for models that compute a loss
        teacher = self._pair.teacher_outputs(batch, device, self._student)
        compared = self._pair.align(batch, outputs, teacher)
        if compared.auxiliary is not None:
            raise ValueError(
                f"the student {self._pair.student.name} has an auxiliary loss, which would not be "
                "trained: set output_router_logits=False, or use "
                "otkd.integrations.transformers.DistillationTrainer"
            )
        return compared.value(self.loss, num_items_in_batch)
