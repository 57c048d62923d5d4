"""Training and prediction with ``transformers.Trainer``: checkpoints, resuming, progress."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from otkd.integrations.transformers import DistillationTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.signals import TeacherSignal

_EVALUATION_ROWS = 64


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    bf16: bool

    def steps(self, rows: int) -> int:
        """Optimiser steps over ``rows`` training rows."""
        return -(-rows // self.batch_size) * self.epochs


@dataclass(frozen=True)
class Fit:
    """What a training took: steps and the seconds spent in them."""

    steps: int
    seconds: float


class _Progress(TrainerCallback, ExportableState):
    """Reports steps and keeps the time spent in them, across interruptions too."""

    def __init__(self, on_steps: Callable[[int], None], seconds: float = 0.0):
        self.on_steps = on_steps
        self.seconds = seconds
        self._epoch_start = 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_steps(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch_start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        # Read before Trainer writes the checkpoint, whose time is no part of a step's.
        self.seconds += time.perf_counter() - self._epoch_start

    def on_step_end(self, args, state, control, **kwargs):
        self.on_steps(1)


def fit(
    model: PreTrainedModel,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    schedule: Schedule,
    folder: Path,
    *,
    loss: nn.Module | None = None,
    teacher: TeacherSignal | None = None,
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
        on_steps: called with the number of steps just done or, at the start, done before.
    """
    options: dict[str, Any] = {
        "model": model,
        "args": _arguments(folder, schedule),
        "train_dataset": train,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }
    if loss is None:
        trainer = Trainer(**options)
    else:
        trainer = DistillationTrainer(**options, loss=loss, teacher=teacher)
    checkpoint = last_complete_checkpoint(folder)
    progress = _Progress(on_steps, _seconds_at(checkpoint) if checkpoint else 0.0)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)
    with warnings.catch_warnings():
        # The scheduler is restored before the first step of a resumed run, as Trainer does it.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return Fit(trainer.state.global_step, progress.seconds)


def predict(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, bf16: bool
) -> Tensor:
    """Logits of all rows, ``(rows, num_labels)``, in their order."""
    lengths = torch.tensor(rows["length"][:])
    order = torch.argsort(lengths, descending=True, stable=True)
    ordered: Any = rows.select(order.tolist())
    # Trainer makes its folder even if nothing is to be written there.
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_eval_batch_size=_EVALUATION_ROWS, **_common(bf16)
        )
        trainer = Trainer(model=model, args=args, data_collator=DataCollatorWithPadding(tokenizer))
        trainer.remove_callback(PrinterCallback)
        predictions = torch.as_tensor(trainer.predict(ordered).predictions, dtype=torch.float32)
    return predictions[torch.argsort(order)]


def _arguments(folder: Path, schedule: Schedule) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        seed=schedule.seed,
        save_strategy="epoch",
        save_total_limit=1,
        **_common(schedule.bf16),
    )


def device() -> torch.device:
    """Where training happens: the accelerator if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _common(bf16: bool) -> dict[str, Any]:
    return {
        "bf16": bf16,
        "use_cpu": device().type == "cpu",
        "dataloader_pin_memory": device().type == "cuda",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "report_to": "none",
    }


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


def _seconds_at(checkpoint: Path) -> float:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    saved = state.get("stateful_callbacks", {}).get(_Progress.__name__, {})
    return float(saved.get("attributes", {}).get("seconds", 0.0))
