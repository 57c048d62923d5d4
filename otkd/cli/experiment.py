"""What all runs of a command share: the task's rows, the models' sources, the settings."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otkd.cli import models
from otkd.cli.console import CommandError, notice
from otkd.cli.objectives import check_objectives, objective_options
from otkd.cli.precision import (
    Precision,
    measure_precision,
    read_precision,
    supports_bf16,
    write_precision,
)
from otkd.cli.training import Schedule, device, predict
from otkd.data import encode, get_task, load_task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.cli.settings import Settings

_PROBE_ROWS = 16


class Experiment:
    """The parts of a command that do not depend on loss and seed, checked when it is made.

    Args:
        settings: the command's settings.
        losses: registry names.
        folder: where the choice of precision is kept.

    Raises:
        CommandError: for settings, losses or models that cannot work together.
        DataError: for rows that cannot be read.
    """

    def __init__(self, settings: Settings, losses: list[str], folder: Path):
        settings.check()
        self.settings = settings
        self.folder = folder
        self.task = get_task(settings.task)
        check_objectives(losses, settings, self.task.num_labels)
        if torch.cuda.device_count() > 1:
            raise CommandError("Show one GPU to this command: CUDA_VISIBLE_DEVICES=0 otkd …")
        if settings.precision == "bf16" and not supports_bf16():
            raise CommandError("--precision bf16: the accelerator here does not support it.")
        self.data = load_task(
            self.task,
            settings.data_dir,
            max_train_rows=settings.max_train_rows,
            max_dev_rows=settings.max_dev_rows,
        )
        self.teacher_source = models.model_source(settings.teacher)
        self.teacher_tokenizer = self._tokenizer(self.teacher_source)
        self.student_tokenizer = (
            self._tokenizer(settings.student) if settings.student else self.teacher_tokenizer
        )
        if not settings.finetune_teacher:
            config = models.load_config(self.teacher_source)
            models.check_is_classifier(self.teacher_source, config, self.task)
        # Made once for its complaints, before an hour goes into a teacher.
        self.build_student(0)

    def _tokenizer(self, source: str) -> PreTrainedTokenizerBase:
        tokenizer = models.load_tokenizer(source)
        if tokenizer.pad_token is None:
            raise CommandError(f"The tokenizer of {source!r} has no padding token.")
        config = models.load_config(source)
        limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
        longest = min(limit for limit in limits if limit is not None)
        if self.settings.max_length > longest:
            raise CommandError(
                f"--max-length {self.settings.max_length}: {source!r} reads at most {longest} "
                "tokens."
            )
        return tokenizer

    def build_student(self, seed: int) -> PreTrainedModel:
        """A student before its training; its head depends on the seed alone."""
        chosen = self.settings
        model = models.build_student(
            self.teacher_source, chosen.student, chosen.student_layers, self.task, seed
        )
        if chosen.freeze_embeddings:
            models.freeze_embeddings(model)
        return model

    @cached_property
    def teacher_settings(self) -> dict[str, Any]:
        """Everything the teacher's logits depend on, by name."""
        chosen = self.settings
        values = {
            "task": self.task.name,
            "data_digest": self.data.digest(),
            "train_rows": len(self.data.train),
            "dev_rows": self.data.dev_rows,
            "max_length": chosen.max_length,
            "precision": chosen.precision,
            "teacher": chosen.teacher or models.DEFAULT_ENCODER,
            "teacher_weights": models.source_digest(self.teacher_source),
            "finetune_teacher": chosen.finetune_teacher,
        }
        if chosen.finetune_teacher:
            for name in ("teacher_epochs", "teacher_learning_rate", "teacher_seed"):
                values[name] = getattr(chosen, name)
            for name in ("batch_size", "freeze_embeddings"):
                values[name] = getattr(chosen, name)
        return values

    @cached_property
    def _student_weights(self) -> str | None:
        return models.source_digest(self.settings.student or self.teacher_source)

    def student_settings(self, loss: str, seed: int) -> dict[str, Any]:
        """Everything a student depends on, by name."""
        chosen = self.settings
        values = {**self.teacher_settings, "loss": loss, "seed": seed}
        for name in ("epochs", "learning_rate", "batch_size", "freeze_embeddings"):
            values[name] = getattr(chosen, name)
        if chosen.student is None:
            values["student_layers"] = chosen.student_layers
        else:
            values["student"] = chosen.student
            values["student_weights"] = self._student_weights
        options = objective_options(loss, chosen)
        return values | {f"loss.{name}": value for name, value in options.items()}

    @cached_property
    def precision(self) -> Precision:
        """The precision of every run, measured once if it is to be chosen."""
        if self.settings.precision != "auto":
            return Precision(self.settings.precision, "as asked for")
        path = self.folder / "precision.json"
        precision = read_precision(path)
        if precision is None:
            rows = self.student_train.select(range(min(_PROBE_ROWS, len(self.student_train))))
            columns = [name for name in rows.column_names if name != "length"]
            batch = self.student_tokenizer.pad(rows.select_columns(columns)[:], return_tensors="pt")
            precision = measure_precision(self.build_student(0), dict(batch), device())
            write_precision(path, precision)
        notice(f"Precision {precision.name}: {precision.reason}.")
        return precision

    def schedule(self, *, teacher: bool, seed: int) -> Schedule:
        """The schedule of a training."""
        chosen = self.settings
        return Schedule(
            epochs=chosen.teacher_epochs if teacher else chosen.epochs,
            batch_size=chosen.batch_size,
            learning_rate=chosen.teacher_learning_rate if teacher else chosen.learning_rate,
            seed=seed,
            bf16=self.precision.bf16,
        )

    @cached_property
    def teacher_train(self) -> Dataset:
        """Training rows as the teacher reads them."""
        return encode(self.data.train, self.teacher_tokenizer, self.settings.max_length)

    @cached_property
    def student_train(self) -> Dataset:
        """Training rows as a student reads them."""
        if self.student_tokenizer is self.teacher_tokenizer:
            return self.teacher_train
        return encode(self.data.train, self.student_tokenizer, self.settings.max_length)

    @cached_property
    def _teacher_dev(self) -> dict[str, Dataset]:
        return self._encode_dev(self.teacher_tokenizer)

    @cached_property
    def _student_dev(self) -> dict[str, Dataset]:
        if self.student_tokenizer is self.teacher_tokenizer:
            return self._teacher_dev
        return self._encode_dev(self.student_tokenizer)

    def _encode_dev(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
        length = self.settings.max_length
        return {name: encode(rows, tokenizer, length) for name, rows in self.data.dev.items()}

    def predict_dev(self, model: PreTrainedModel, *, teacher: bool) -> dict[str, Tensor]:
        """Logits on each development split."""
        tokenizer = self.teacher_tokenizer if teacher else self.student_tokenizer
        splits = self._teacher_dev if teacher else self._student_dev
        return {
            name: predict(model, rows, tokenizer, bf16=self.precision.bf16)
            for name, rows in splits.items()
        }

    @cached_property
    def dev_labels(self) -> dict[str, Tensor]:
        """Labels of each development split."""
        return {name: torch.tensor(rows["label"][:]) for name, rows in self.data.dev.items()}
