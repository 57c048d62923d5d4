"""Training with ``transformers.Trainer``: checkpoints, resuming, progress."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from otkd.files import errors_about
from otkd.integrations.transformers import DistillationTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.signals import TeacherSignal


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train, and how often to look at the outcome."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    bf16: bool
    group_by_length: bool = True
    evaluate_every: int | None = None

    def steps(self, rows: int) -> int:
        """Optimiser steps over ``rows`` training rows."""
        return -(-rows // self.batch_size) * self.epochs


@dataclass(frozen=True)
class Fit:
    """What a training took, and its evaluations.

    Attributes:
        steps: optimiser steps.
        seconds: time spent in them, without evaluations and checkpoints.
        evaluations: the step of each evaluation and the metrics then.
    """

    steps: int
    seconds: float
    evaluations: tuple[tuple[int, dict[str, float]], ...] = ()


class _Progress(TrainerCallback, ExportableState):
    """Reports steps; keeps the time spent in them and the evaluations, across interruptions too."""

    def __init__(
        self,
        on_steps: Callable[[int], None],
        evaluate: Callable[[PreTrainedModel], dict[str, float]] | None,
        every: int | None,
        saved: dict[str, Any],
    ):
        self.on_steps = on_steps
        self.evaluate, self.every = evaluate, every
        self.seconds: float = saved.get("seconds", 0.0)
        self.evaluations = [(step, metrics) for step, metrics in saved.get("evaluations", ())]
        self._start = 0.0

    def state(self) -> dict[str, Any]:
        attributes = {"seconds": self.seconds, "evaluations": self.evaluations}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_steps(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        # Read before Trainer writes the checkpoint, whose time is no part of a step's.
        self.seconds += time.perf_counter() - self._start

    def on_step_end(self, args, state, control, **kwargs):
        self.on_steps(1)
        last = state.global_step == state.max_steps
        if self.evaluate is None or self.every is None or last or state.global_step % self.every:
            return
        begun = time.perf_counter()
        self.evaluations.append((state.global_step, self.evaluate(kwargs["model"])))
        self._start += time.perf_counter() - begun


def fit(
    model: PreTrainedModel,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    schedule: Schedule,
    folder: Path,
    *,
    loss: nn.Module | None = None,
    teacher: TeacherSignal | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    evaluate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    on_steps: Callable[[int], None],
) -> Fit:
    """Train ``model`` in place, going on from the last complete checkpoint in ``folder``.

    Args:
        model: a classifier.
        train: encoded rows (see :func:`otkd.data.encode`).
        tokenizer: pads the batches.
        schedule: how long and how fast.
        folder: where a checkpoint is kept after every epoch; for the caller to remove.
        loss: an otkd loss against ``teacher``; without it, the model's own cross-entropy.
        teacher: stored logits, one entry per row of ``train``.
        callbacks: of the trainer.
        evaluate: gives the metrics of a model; called every ``schedule.evaluate_every`` steps, if
            any, and at the end.
        on_steps: called with the number of steps just done or, at the start, done before.
    """
    options: dict[str, Any] = {
        "model": model,
        "args": _arguments(folder, schedule),
        "train_dataset": train,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "callbacks": list(callbacks),
    }
    if loss is None:
        trainer = Trainer(**options)
    else:
        trainer = DistillationTrainer(**options, loss=loss, teacher=teacher)
    checkpoint = last_complete_checkpoint(folder)
    saved = _saved_progress(checkpoint) if checkpoint else {}
    progress = _Progress(on_steps, evaluate, schedule.evaluate_every, saved)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)
    with warnings.catch_warnings():
        # The scheduler is restored before the first step of a resumed run, as Trainer does it.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        with errors_about(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    steps = trainer.state.global_step
    if evaluate is not None:
        progress.evaluations.append((steps, evaluate(model)))
    return Fit(steps, progress.seconds, tuple(progress.evaluations))


def _arguments(folder: Path, schedule: Schedule) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length" if schedule.group_by_length else "random",
        length_column_name="length",
        seed=schedule.seed,
        save_strategy="epoch",
        save_total_limit=1,
        bf16=schedule.bf16,
        use_cpu=device().type == "cpu",
        dataloader_pin_memory=device().type == "cuda",
        disable_tqdm=True,
        logging_strategy="no",
        report_to="none",
    )
    # Several GPUs train several students; one process never spreads a batch over them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def device() -> torch.device:
    """Where training happens: the accelerator if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end; later, incomplete ones are removed."""
    numbered = sorted(
        (int(number), path)
        for path in folder.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdigit()
    )
    for _, path in reversed(numbered):
        try:
            # Trainer writes this file last.
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            return path
    return None


def _saved_progress(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state.get("stateful_callbacks", {}).get(_Progress.__name__, {}).get("attributes", {})
