"""Training with ``transformers.Trainer``: checkpoints, resuming, progress, divergence."""

from __future__ import annotations

import json
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from otkd.files import errors_about
from otkd.integrations.transformers import DistillationTrainer
from otkd.study.work import last_whole_checkpoint, seal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from datasets import Dataset
    from transformers import PreTrainedModel

    from otkd.teachers import StoredTeacher


@dataclass(frozen=True)
class Schedule:
    """Duration and learning rate of a training, and how often to evaluate."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    bf16: bool
    group_by_length: bool = True
    evaluate_every: int | None = None
    warmup: float = 0.0

    def steps(self, rows: int) -> int:
        """Optimiser steps over ``rows`` training rows."""
        return -(-rows // self.batch_size) * self.epochs


@dataclass(frozen=True)
class Fit:
    """Steps and seconds of a training, without evaluations and checkpoints; its evaluations."""

    steps: int
    seconds: float
    evaluations: tuple[tuple[int, dict[str, float]], ...] = ()


# How torch, scipy, POT and the losses name a number that is not finite.
_NOT_FINITE = re.compile(r"\b(nans?|infs?|infinit\w*|(not|non)[- ]finite|overflow\w*)\b", re.I)


class DivergedError(ArithmeticError):
    """A number of a training is not finite: the ``reason``; ``took`` is the training until then."""

    def __init__(self, took: Fit, reason: str):
        super().__init__(f"after {took.steps} steps: {reason}")
        self.took, self.reason = took, reason


# Seconds of training after which a checkpoint is written within an epoch: one per epoch would lose
# hours of a training on texts, and one per number of steps would slow small classifiers down.
_SAVE_AFTER = 300.0


class _Progress(TrainerCallback, ExportableState):
    """Reports steps and asks for checkpoints within an epoch.

    Its times and evaluations are in the checkpoints, so that they are resumed. So is the random
    state from which the sampler draws the order of an epoch: Trainer draws the order again when it
    resumes within an epoch, and restores the state of the checkpoint only afterwards.
    """

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
        self._order: str | None = saved.get("order")
        self._resumed = bool(saved)
        self._saved_at = self.seconds
        self._start: float | None = None

    def state(self) -> dict[str, Any]:
        names = {"seconds": self.seconds, "evaluations": self.evaluations, "order": self._order}
        return {"args": {}, "attributes": names}

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_steps(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self._order is not None:
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(self._order), dtype=torch.uint8))
        elif not self._resumed:  # a checkpoint of an earlier version has no order
            self._order = _random_state()

        self._start = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        if self._start is None:  # after a checkpoint
            self._start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        # Before Trainer writes the checkpoint, whose time does not count.
        self.stop()
        self._order = _random_state()

    def stop(self) -> None:
        if self._start is not None:
            self.seconds += time.perf_counter() - self._start
            self._start = None

    def on_save(self, args, state, control, **kwargs):
        self._saved_at = self.seconds
        seal(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_step_end(self, args, state, control, **kwargs):
        self.on_steps(1)
        if state.global_step == state.max_steps:
            return
        begun = time.perf_counter()
        assert self._start is not None
        taken = self.seconds + begun - self._start
        if self.evaluate and self.every and state.global_step % self.every == 0:
            self.evaluations.append((state.global_step, self.evaluate(kwargs["model"])))
            self._start += time.perf_counter() - begun
        if self._order is not None and taken - self._saved_at >= _SAVE_AFTER:
            self.stop()
            control.should_save = True

    def took(self, steps: int) -> Fit:
        self.stop()
        return Fit(steps, self.seconds, tuple(self.evaluations))


def _random_state() -> str:
    return torch.get_rng_state().numpy().tobytes().hex()


class _Watched:
    """A trainer that stops at the first step whose numbers are not finite."""

    _logits: Tensor | None = None

    def watch(self, model: nn.Module) -> None:
        """Keep the logits of the last call of ``model``, which tell why a step failed."""
        model.register_forward_hook(self._keep_logits)

    def _keep_logits(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        self._logits = getattr(outputs, "logits", None)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's step; ``FloatingPointError`` if it fails because of a number not finite."""
        try:
            loss = super().training_step(*args, **kwargs)  # pyright: ignore
        except Exception as error:
            finite = self._logits is None or bool(self._logits.isfinite().all())
            named = isinstance(error, ArithmeticError) or _NOT_FINITE.search(str(error))
            if finite and not named:
                raise
            raise FloatingPointError(str(error)) from error
        # Instead of logging_nan_inf_filter, which waits for the same number.
        if not loss.isfinite():
            raise FloatingPointError(f"the training loss is {loss.item()}")
        return loss


class _WatchedTrainer(_Watched, Trainer):
    pass


class _WatchedDistillationTrainer(_Watched, DistillationTrainer):
    pass


def fit(
    model: PreTrainedModel,
    train: Dataset,
    collate: Callable[[list], Any],
    schedule: Schedule,
    folder: Path,
    *,
    loss: nn.Module | None = None,
    teacher: StoredTeacher | None = None,
    options: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    evaluate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    on_steps: Callable[[int], None],
) -> Fit:
    """Train ``model`` in place, resuming from the last valid checkpoint in ``folder``.

    Args:
        model: a classifier or a causal language model.
        train: encoded rows.
        collate: pads a batch of them.
        schedule: duration and learning rate.
        folder: for a checkpoint after every epoch, and every few minutes; the caller removes it.
        loss: an otkd loss against ``teacher``; without it, the model's own cross-entropy.
        teacher: stored outputs, one entry per row of ``train``.
        options: further arguments of the trainer with a loss.
        callbacks: of the trainer.
        evaluate: computes the metrics of a model, every ``schedule.evaluate_every`` steps and at
            the end.
        on_steps: called with the number of new steps and, at the start, of steps in the checkpoint.

    Raises:
        DivergedError: if the loss or the logits of an evaluation are not finite.
    """
    shared: dict[str, Any] = {
        "model": model,
        "args": _arguments(folder, schedule, schedule.steps(len(train))),
        "train_dataset": train,
        "data_collator": collate,
        "callbacks": list(callbacks),
    }
    if loss is None:
        trainer = _WatchedTrainer(**shared)
    else:
        trainer = _WatchedDistillationTrainer(
            **shared, **(options or {}), loss=loss, teacher=teacher
        )
    trainer.watch(model)
    checkpoint = last_whole_checkpoint(folder)
    saved = _saved_progress(checkpoint) if checkpoint else {}
    progress = _Progress(on_steps, evaluate, schedule.evaluate_every, saved)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)
    try:
        with warnings.catch_warnings(), errors_about(folder):
            # Trainer restores the scheduler before the first step of a resumed run.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if evaluate is not None:
            progress.evaluations.append((trainer.state.global_step, evaluate(model)))
    except FloatingPointError as error:
        raise DivergedError(progress.took(trainer.state.global_step), str(error)) from error
    return progress.took(trainer.state.global_step)


def _arguments(folder: Path, schedule: Schedule, steps: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(schedule.warmup * steps),
        weight_decay=0.0,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length" if schedule.group_by_length else "random",
        length_column_name="length",
        seed=schedule.seed,
        save_strategy="epoch",
        save_total_limit=2,  # in case the last one is damaged
        bf16=schedule.bf16,
        use_cpu=device().type == "cpu",
        dataloader_pin_memory=device().type == "cuda",
        disable_tqdm=True,
        logging_strategy="no",
        report_to="none",
        logging_nan_inf_filter=False,
    )
    # Several GPUs train several students; a batch is never distributed over them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _saved_progress(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state.get("stateful_callbacks", {}).get(_Progress.__name__, {}).get("attributes", {})
