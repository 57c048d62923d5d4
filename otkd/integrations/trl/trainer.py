"""TRL's stable ``DistillationTrainer`` with an otkd loss in place of its divergence."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from trl.models.utils import prepare_deepspeed
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer as StableTrainer
from trl.trainer.utils import entropy_from_logits

from otkd.integrations.comparison import Comparison
from otkd.integrations.records import LossRecord
from otkd.integrations.refusals import refuse_training
from otkd.integrations.trl.completions import GivenCompletions
from otkd.integrations.trl.heads import head_logits
from otkd.integrations.trl.settings import (
    refuse_loss,
    refuse_off_policy,
    refuse_tokenizer,
    vocabularies_differ,
)
from otkd.losses.protocol import as_loss
from otkd.reductions import IGNORE_INDEX, ItemCounts, count_items
from otkd.scalars import as_flag

# What a vision-language model reads besides tokens: the optional arguments of TRL's forward pass.
_IMAGE_INPUTS = [
    name
    for name, parameter in inspect.signature(
        StableTrainer._get_last_hidden_state
    ).parameters.items()
    if parameter.default is None
]


class DistillationTrainer(StableTrainer):
    """TRL's ``DistillationTrainer`` that minimises any otkd loss against its teacher.

    The student generates completions of the prompts, as in TRL, or with ``off_policy=True`` gets
    those of the data set. The loss is called with the logits of student and teacher at the tokens
    of the completions, ``(batch, positions, vocab)``, and with these tokens as labels. Prompts,
    padding and the results of tools have label −100. The ``temperature`` of the configuration
    belongs to the generation only; the loss has its own.

    The batch of a step consists of all its microbatches in all processes, as in
    :class:`otkd.integrations.transformers.DistillationTrainer`: gradient accumulation adds up to
    the full batch for every loss that is a sum over positions or sequences. Training logs contain
    the terms of the loss and the worst solver report as there. In an evaluation ``eval_loss`` is
    the mean of the losses of the batches.

    Logits are computed by the output heads inside TRL's forward redirection, so the heads may be
    sharded. All logits of the completions are held in memory.

    Args:
        model: of TRL, like all other arguments.
        teacher_model: of TRL. Its vocabulary may have another size than the student's if the
            tokenizer is the same and one output head is padded: then pass both as models, and
            ``vocab_size=`` to the loss.
        args: of TRL.
        *others: of TRL.
        loss: an otkd loss without trainable parameters; it is moved to the training device.
        off_policy: train on the column ``completion`` of the data sets instead of generating. It is
            a text if the prompt is a text, or one message of the assistant if it is messages. An
            end-of-sequence token is appended to texts, and completions are cut at
            ``max_completion_length`` tokens.
        **options: of TRL.

    Raises:
        TypeError: if ``loss`` is not an otkd loss, or ``off_policy`` is not a flag.
        ValueError: without a teacher; for a ``beta`` in the configuration; for
            ``reduction="none"``; for a loss with trainable parameters; for a loss with hard labels
            without ``off_policy``; for vocabularies that differ; if the teacher shares trainable
            parameters with the student; for completions that are missing or empty; for
            ``off_policy`` with tools, vLLM or a processor of images.
    """

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | nn.Module | None = None,
        args: DistillationConfig | None = None,
        *others: Any,
        loss: nn.Module,
        off_policy: bool = False,
        **options: Any,
    ) -> None:
        self.off_policy = as_flag("off_policy", off_policy)
        refuse_loss(loss, args, off_policy=self.off_policy)
        if teacher_model is None:
            raise ValueError("teacher_model is missing: pass a model, or its name or folder")
        differ = vocabularies_differ(model, teacher_model, loss)
        # TRL refuses a teacher with padded logits, but not that it is set afterwards.
        given = None if differ else teacher_model
        super().__init__(cast("Any", model), cast("Any", given), args, *others, **options)
        if differ:
            self._set_teacher(cast("nn.Module", teacher_model))
        self.loss = loss.to(self.args.device)
        refuse_training(
            self.args,
            student=cast("nn.Module", self.model),
            teachers=[self.accelerator.unwrap_model(self.teacher_model)],
            loss=self.loss,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            has_other_objective=False,
        )
        if self.off_policy:
            refuse_off_policy(
                self.args, self.processing_class, self.tools, self.train_dataset, self.eval_dataset
            )
            template = {
                "chat_template": self.chat_template,
                **cast("dict[str, Any]", self.chat_template_kwargs),
            }
            self._given = GivenCompletions(
                self._tokenizer, self.eos_token_ids, self.max_completion_length, template
            )
        self._examples: list[dict[str, Any]] = []
        self._records = LossRecord(skip_non_finite=self.args.logging_nan_inf_filter)

    def _set_teacher(self, teacher: nn.Module) -> None:
        refuse_tokenizer(cast("nn.Module", self.model), teacher, self._tokenizer)
        if self.is_deepspeed_enabled:
            self.teacher_model = prepare_deepspeed(teacher, self.accelerator)
        else:
            self.teacher_model = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        return _EpochSampler(sampler) if self.shuffle_dataset else sampler

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._examples = inputs
        batch = super()._generate_and_score_completions(inputs)
        sequences = count_items(_counted(batch))[1]
        # A scalar, so that TRL gives it to each microbatch, like the number of tokens.
        batch["num_sequences_in_batch"] = cast("Tensor", self.accelerator.gather(sequences)).sum()
        return batch

    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **options: Any):
        if not self.off_policy:
            return super()._generate_single_turn(prompt_ids, *others, **options)
        pairs = zip(self._examples, prompt_ids, strict=True)
        return [self._given.tokens(example, ids) for example, ids in pairs]

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a microbatch, the summed entropy of the student, and the counted tokens.

        TRL calls this within the forward pass of the wrapped student. The teacher runs within that
        of its own wrapper, and first, so that its activations are freed before the student's are
        stored.
        """
        teacher_model = cast("Any", self.teacher_model).eval()
        unwrapped_teacher = self.accelerator.unwrap_model(teacher_model)
        with torch.no_grad():
            teacher = self._forward_redirection(
                teacher_model, unwrapped_teacher, self._outputs, unwrapped_teacher, inputs
            )
        student = self._outputs(unwrapped_student, inputs)
        logits = student["logits"]
        counted = _counted(inputs).to(logits.device)
        labels = inputs["completion_ids"].to(logits.device).masked_fill(~counted, IGNORE_INDEX)
        compared = Comparison(student, teacher, labels, None, logits, None)
        if num_items_in_batch is None:  # an evaluation
            value = compared.value(self.loss, None)
        else:
            items = ItemCounts(inputs["num_items_in_batch"], inputs["num_sequences_in_batch"])
            # The items are those of all processes, and DDP averages gradients instead of adding.
            scale = self.accelerator.num_processes
            value = compared.value(self.loss, items) * scale
            self._record(counted, scale)
        entropy = entropy_from_logits(logits.detach())[counted].float().sum()
        return value, entropy, counted.sum()

    def _outputs(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Logits at the positions that predict the completion, and features if the loss needs them.

        Logits are ``(batch, positions, vocab)``, features ``(batch, positions, width)``.
        """
        hidden = self._get_last_hidden_state(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            **{name: inputs[name] for name in _IMAGE_INPUTS if name in inputs},
        )
        outputs = {"logits": head_logits(model, hidden)}
        return outputs | ({"features": hidden} if as_loss(self.loss).needs_features else {})

    def _record(self, counted: Tensor, scale: int) -> None:
        steps = 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        self._records.add(as_loss(self.loss), share=scale, steps=steps, positions=counted.sum)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log; the terms of the loss and solver reports are added to training logs."""
        if "loss" in logs and "learning_rate" in logs:  # a training log, which all processes write
            logs.update(self._records.take())
        super().log(logs, start_time)


class _EpochSampler(Sampler):
    """TRL's sampler with an order for each epoch that depends on the seed and its number alone.

    TRL draws the orders of all epochs from one random state, which a resumed run does not have.

    Args:
        sampler: TRL's ``RepeatSampler``, which shuffles.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch, counted from 0."""
        self._epoch = epoch

    def __iter__(self) -> Any:
        self._sampler.generator.manual_seed(self._sampler.seed + self._epoch)
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


def _counted(inputs: dict[str, Any]) -> Tensor:
    """Whether each token of the completions counts: neither padding nor the result of a tool."""
    counted = inputs["completion_mask"] != 0
    return counted & (inputs["tool_mask"] != 0) if "tool_mask" in inputs else counted
