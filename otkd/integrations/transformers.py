"""Distillation with ``transformers.Trainer``: a subclass with a teacher and a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from otkd.alignment.examples import TEXT_COLUMNS
from otkd.integrations.aligning import Aligner
from otkd.integrations.batches import label_key, label_names_of
from otkd.integrations.comparison import Comparison
from otkd.integrations.counting import StepItems, step_items
from otkd.integrations.evaluation import Evaluation, cross_entropy
from otkd.integrations.loss_parameters import TrainsLoss
from otkd.integrations.objective import compute_loss_func
from otkd.integrations.packing import PACKED_KEY
from otkd.integrations.pair import Pair
from otkd.integrations.records import LossRecord
from otkd.integrations.refusals import check_loss, refuse_training, refuse_two_tokenizers
from otkd.integrations.stored import (
    TEACHER_INDEX,
    TEACHER_KEY,
    TeacherCollator,
    WithTeacher,
    as_stored_teacher,
    with_eval_teacher,
)
from otkd.integrations.teachers import runs
from otkd.losses.protocol import as_loss
from otkd.reductions import ItemCounts
from otkd.teachers import StoredTeacher

__all__ = ["DistillationTrainer", "compute_loss_func"]


class DistillationTrainer(TrainsLoss):
    """A ``transformers.Trainer`` that minimises an otkd loss against a teacher.

    The loss is called with the logits of student and teacher. Models that cannot be trained, or
    cannot be the teacher, are refused: see the table of model kinds in ``docs/training.md``. Models
    do not get the labels, except encoder-decoders that derive the input of their decoder from them.
    For causal language models the logits of position t are paired with label t + 1. Positions with
    label −100 do not count, nor does the first token of a packed document. Without labels, tokens
    count where the attention mask is 1. The auxiliary loss of experts is added in training.

    The batch of a step consists of all its microbatches in all processes: for losses that are sums
    over positions or sequences, the gradient is that of a single process with the whole batch, also
    if a microbatch or process has no counted position. Losses between the samples of a batch see
    the samples of all processes, but of one microbatch.

    Evaluation reports ``eval_loss`` if there is a teacher (a model, ``eval_teacher``, or a
    ``teacher_logits`` column), and ``eval_cross_entropy`` of the hard labels if there are labels.
    Without a teacher the latter is also ``eval_loss``. Both are means over everything that counts
    in the evaluation set. Training logs contain each term of the loss and the worst solver report
    since the last log.

    Parameters of the loss are trained without weight decay and gradient clipping, and are saved in
    checkpoints as ``loss.pt``. The teacher is sharded if the student is, and is not saved.

    Args:
        *args: of ``transformers.Trainer``, like all other keyword arguments.
        loss: an otkd loss; it is moved to the training device.
        teacher: one of

            - a model that takes the student's inputs and returns ``logits``,
            - ``"base_model"`` for a PEFT student: the student without its adapters,
            - several models: with ``teacher_weights`` their mixture, otherwise one per example,
              chosen by its ``teacher_index``,
            - stored logits, as a tensor or a :class:`~otkd.teachers.StoredTeacher`, with one entry
              per example of ``train_dataset`` in its order; at token level from the first token on,
            - None, if the examples have a ``teacher_logits`` entry or the loss needs no teacher.

            Logits in the examples are used in preference to a model. If the loss compares features,
            pass a model, or ``DenseTeacher(logits, features)`` with the last hidden states (for a
            sequence classifier, those of the first token).
        teacher_weights: of several teachers, positive and adding up to 1. The teacher is the mean
            of their distributions at the temperature at which the loss reads its teacher.
        eval_teacher: stored logits of ``eval_dataset``, or a dictionary of them if that is one.
        shift: whether logits are paired with the next label. The default is True for causal
            language models of transformers, and for other modules with such a teacher. Pass it if
            that is stored.
        teacher_tokenizer: of a causal language model that does not have the student's tokenizer,
            which is then needed as ``processing_class``. The models are compared where both have
            read the same bytes, and hard labels stay those of all tokens of the student. Examples
            have ``input_ids`` or a ``text``; for a teacher with another chat template also
            ``teacher_input_ids`` and ``teacher_labels``. A stored teacher has the positions of its
            own tokens. See ``docs/two_tokenizers.md``.

    Raises:
        TypeError: if ``loss`` or a teacher has an unsupported type.
        ValueError: if the loss needs a teacher, or a teacher's features, and there is none; if the
            number of stored entries differs from that of the examples; if training would change
            the teacher; for label smoothing, ``compute_loss_func``, ``reduction="none"`` and
            several GPUs in one process; for a loss with parameters in several processes; for a
            model without logits of classes; for a teacher that reads another vocabulary than the
            student without ``teacher_tokenizer``, orders its classes differently, or predicts
            another token at each position; with ``teacher_tokenizer``, for a loss that compares
            the same tokens.
    """

    def __init__(
        self,
        *args: Any,
        loss: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | StoredTeacher | Tensor | str | None = None,
        teacher_weights: Sequence[float] | None = None,
        eval_teacher: StoredTeacher | Tensor | Mapping[str, StoredTeacher | Tensor] | None = None,
        shift: bool | None = None,
        teacher_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        check_loss(loss)
        super().__init__(*args, **kwargs)
        self.loss = loss.to(self.args.device)
        self._loss = as_loss(self.loss)
        self.teacher = teacher if runs(teacher) else None
        if teacher is not None and self.teacher is None:
            self.train_dataset = WithTeacher(self.train_dataset, as_stored_teacher(teacher))
        self.eval_dataset = with_eval_teacher(self.eval_dataset, eval_teacher)
        aligner = None
        if teacher_tokenizer is not None:
            refuse_two_tokenizers(self.loss, teacher, self.processing_class)
            aligner = Aligner(self.processing_class, teacher_tokenizer)
        self._own_tokens = aligner is not None
        self.data_collator = TeacherCollator(self.data_collator, aligner)
        self._pair = Pair(
            cast("nn.Module", self.model),
            self.teacher,
            self.loss,
            shift=shift,
            label_names=label_names_of(self.label_names, self.args.label_names),
            teacher_weights=teacher_weights,
            own_tokens=self._own_tokens,
        )
        refuse_training(
            self.args,
            student=cast("nn.Module", self.model),
            teachers=self._pair.teacher_models,
            loss=self.loss,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            has_other_objective=self.compute_loss_func is not None,
        )
        self._pair.place_teacher(self.accelerator)

        # Tells Trainer that the loss is divided by the items of all microbatches.
        self.model_accepts_loss_kwargs = True
        self._train_loss(self.loss)
        self._records = LossRecord(skip_non_finite=self.args.logging_nan_inf_filter)
        self._evaluation: Evaluation | None = None

    @property
    def shift(self) -> bool:
        """Whether logits are paired with the next label."""
        return self._pair.shift

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            # Keep the columns that only the teacher reads, such as segments, and the labels, which
            # decide which positions count even if no model reads them.
            columns = {*cast("list[str]", self._signature_columns), *self._pair.columns()}
            columns |= {
                TEACHER_KEY,
                TEACHER_INDEX,
                "labels",
                "shift_labels",
                *self._pair.label_names,
                *(TEXT_COLUMNS if self._own_tokens else ()),
            }
            self._signature_columns = sorted(columns)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        return step_items(
            [(batch, *self._pair.targets(batch)) for batch in batch_samples],
            shift=self.shift,
            device=device,
            accelerator=self.accelerator,
            average_tokens=self.args.average_tokens_across_devices,
            replicas=self.get_tp_size() * self.get_cp_size() * self.get_sp_size(),
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepItems | ItemCounts | Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; None if an evaluation lacks both teacher and labels.

        With ``return_outputs``, a pair of the loss and ``{"logits": student_logits}``.

        Raises:
            ValueError: in training, if the loss needs a teacher and the batch has none.
        """
        compared = self._pair.compare(
            model, inputs, self.args.device, autocast=self.accelerator.autocast()
        )
        predictions = compared.predictions
        if self._evaluation is not None:
            packed = inputs.get(PACKED_KEY)
            examples = len(predictions) if packed is None else len(packed)
            compared = compared.first(self._evaluation.own_examples(examples), packed)
        logits, labels = compared.student["logits"], compared.labels
        objective = len(logits) > 0 and compared.suffices(self.loss, training=model.training)
        if self._evaluation is not None:
            self._evaluation.see(logits, labels)
        if objective:
            items, common = num_items_in_batch, None
            if isinstance(items, StepItems):
                items, common = items.of(logits), items.common
            loss = compared.value(self.loss, items, common)
            if self._evaluation is not None:
                self._evaluation.add(compared.parts(self.loss, loss))
            if model.training:
                loss = loss * self._record(compared, items)
                if compared.auxiliary is not None:
                    loss = loss + self._auxiliary(compared.auxiliary, items)
        else:
            # Without its teacher, an evaluation reports only the hard-label cross-entropy.
            hard = labels if compared.teacher is None else None
            loss = None if hard is None else cross_entropy(logits, hard)
        return (loss, {"logits": predictions}) if return_outputs else loss

    def _auxiliary(self, value: Tensor, items: object) -> Tensor:
        """A microbatch's share of the auxiliary loss, which is averaged over microbatches."""
        steps = 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        self._records.add_term("auxiliary", value, share=steps, steps=steps)
        return value if items is None else value * steps

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of an evaluation batch; None if unavailable or not requested."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        logits, key = outputs["logits"], label_key(inputs, self._pair.label_names)
        labels = None if key is None else inputs[key]
        if self._evaluation is not None and not prediction_loss_only:
            labels = self._evaluation.labels_of_all(labels, logits)
        if loss is None and self.accelerator.num_processes > 1:
            # Trainer gathers a loss from all processes or from none.
            loss = logits.new_full((), float("nan"), dtype=torch.float32)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's loop, with the exact means of :class:`Evaluation` as metrics."""
        self._evaluation = Evaluation(self._loss, self.accelerator)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            means = self._evaluation.metrics()
        finally:
            self._evaluation = None
        metrics = cast("dict[str, float]", output.metrics)
        metrics.pop(f"{metric_key_prefix}_loss", None)
        metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's training, of all processes together, also after an evaluation."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model and not sharded:
            # An evaluation marks the model as prepared. Accelerate would not wrap it again, and
            # every process would train a model of its own.
            vars(self.model).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    def _record(self, compared: Comparison, items: object) -> float:
        """Record the last call of the loss for the next log; returns the factor of its value."""
        # The items are those of all processes, and DDP averages gradients instead of adding them.
        scale = 1 if items is None else self.accelerator.num_processes // self.get_tp_size()
        steps = 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        self._records.add(
            self._loss,
            share=steps if items is None else scale,
            steps=steps,
            positions=lambda: compared.counted()[0],
        )
        return scale

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log; the terms of the loss and solver reports are added to training logs."""
        if "loss" in logs and "learning_rate" in logs:  # a training log, which all processes write
            logs.update(self._records.take())
        super().log(logs, start_time)
