"""What the recipes with answers of the student share: a trainer on a mixture, and its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from recipe import Materials, Setup, refused_settings
from torch import nn

from otkd.integrations.trl import DistillationTrainer
from otkd.study.messages import StudyError
from otkd.tasks.causal_lm import Instruction, fitting_prompts

# Other defaults than TRL's, so that a recipe runs without a GPU, and as the papers generate.
DEFAULTS = {
    "max_completion_length": 256,
    "temperature": 1.0,
    "bf16": torch.cuda.is_available(),
    "gradient_checkpointing": False,
}


class MixtureTrainer(DistillationTrainer):
    """Trains on answers of the student in a share of the steps, and on those of the data otherwise.

    In an evaluation all answers are those of the data. The choice of a step is drawn from torch's
    random state, which checkpoints contain.

    Args:
        *args: of otkd's ``DistillationTrainer`` for TRL.
        share: the share of steps, as a number or a function of the trainer.
        loss: for answers of the data, and of the student if there is no other.
        sample_loss: for answers of the student.
        **options: of the ``DistillationTrainer``.
    """

    def __init__(
        self,
        *args: Any,
        share: float | Callable[[MixtureTrainer], float],
        loss: nn.Module,
        sample_loss: nn.Module | None = None,
        **options: Any,
    ) -> None:
        if not callable(share) and not 0 <= share <= 1:
            raise ValueError(f"the share of the student's answers is {share}, but must be 0 … 1")
        super().__init__(*args, loss=loss, off_policy=True, **options)
        self.share = share
        self.losses = {True: self.loss, False: (sample_loss or loss).to(self.args.device)}

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        self.off_policy = not self.model.training or torch.rand(()).item() >= self.current_share()
        self.loss = self.losses[self.off_policy]
        return super()._generate_single_turn(*args, **options)

    def current_share(self) -> float:
        """The share of steps with answers of the student."""
        return self.share(self) if callable(self.share) else self.share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["share"] = self.current_share()
        super().log(logs, start_time)


def mixture_trainer(
    materials: Materials, setup: Setup, args: Any, **options: Any
) -> MixtureTrainer:
    """A trainer with these materials; ``options`` are its losses and its share.

    Raises:
        StudyError, DataError: for settings that are refused, and prompts that leave no room.
    """
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    train = _dataset(materials.train, materials, setup, args)
    if len(train) < step:
        raise StudyError(
            f"A step reads {step} rows, but there are only {len(train)}: choose a smaller "
            "--per-device-train-batch-size or --gradient-accumulation-steps."
        )
    held_out = None
    if materials.held_out:
        held_out = _dataset(materials.held_out, materials, setup, args)
    materials.tokenizer.padding_side = "left"
    with refused_settings():
        return MixtureTrainer(
            materials.student,
            materials.teacher,
            args,
            train,
            eval_dataset=held_out,
            processing_class=materials.tokenizer,
            **options,
        )


def _dataset(rows: list[Instruction], materials: Materials, setup: Setup, args: Any) -> Dataset:
    tokenizer = materials.tokenizer
    longest = setup.max_length - args.max_completion_length
    if longest < 1:
        raise StudyError(
            f"--max-completion-length {args.max_completion_length} leaves no room for a prompt in "
            f"--max-length {setup.max_length}."
        )
    found = fitting_prompts(rows, tokenizer, longest, skip_long=setup.skip_long_prompts)
    examples = []
    for row, _ in found:
        prompt, answer = row.prompt(tokenizer), row.answers[0]
        if not isinstance(prompt, str):
            answer = [{"role": "assistant", "content": answer}]
        examples.append({"prompt": prompt, "completion": answer})
    return Dataset.from_list(examples)
