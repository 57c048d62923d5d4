"""What all runs of a command share: the task's rows, the models' sources, the settings."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otkd.study import models
from otkd.study.evaluation import Predictor
from otkd.study.messages import StudyError, notice
from otkd.study.objectives import check_objectives, objective_options
from otkd.study.precision import (
    PRECISION_FILE,
    Precision,
    measure_precision,
    read_precision,
    supports_bf16,
    write_precision,
)
from otkd.study.training import Schedule, device
from otkd.tasks import SAMPLE_SEED, encode, get_task, load_task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.study.protocols import Objective, Tuning
    from otkd.study.settings import Settings

_PROBE_ROWS = 16


@dataclass(frozen=True)
class Rows:
    """The rows of a training and those that score it, as one tokenizer encodes them.

    Attributes:
        train: training rows.
        dev: development rows by split.
        labels: their labels.
        index: where the training rows are part of the task's, their places among these.
        held_out: likewise the places of the rows that stand in for each development split.
    """

    train: Dataset
    dev: dict[str, Predictor]
    labels: dict[str, Tensor]
    index: list[int] | None = None
    held_out: list[int] | None = None

    def counts(self) -> dict[str, int]:
        """Number of rows, for result files."""
        return {"train": len(self.train), "dev": sum(map(len, self.labels.values()))}

    def predict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Logits of ``model`` on each development split."""
        return {name: rows.logits(model) for name, rows in self.dev.items()}


class Experiment:
    """The parts of a command that do not depend on loss and seed, checked when it is made.

    Args:
        settings: shared by all losses.
        objectives: the losses with their own settings.
        tuning: how their candidates are compared, if they have any.
        folder: where the choice of precision is kept.

    Raises:
        StudyError: for settings, losses or models that cannot work together.
        DataError: for rows that cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        objectives: Sequence[Objective],
        folder: Path,
        tuning: Tuning | None = None,
    ):
        settings.check()
        self.settings = settings
        self.objectives = objectives
        self.tuning = tuning
        self.folder = folder
        self.task = get_task(settings.task)
        check_objectives(objectives, self.task.num_labels)
        if settings.precision == "bf16" and not supports_bf16():
            raise StudyError("--precision bf16: the accelerator here does not support it.")
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
        # Made once for their complaints, before an hour goes into a teacher.
        self.build_student(0)
        if any(objective.candidates for objective in objectives):
            self.train_rows(tuning=True)

    def _tokenizer(self, source: str) -> PreTrainedTokenizerBase:
        tokenizer = models.load_tokenizer(source)
        if tokenizer.pad_token is None:
            raise StudyError(f"The tokenizer of {source!r} has no padding token.")
        config = models.load_config(source)
        special = tokenizer.num_special_tokens_to_add(pair=len(self.task.sentences) > 1)
        least = special + len(self.task.sentences)
        if self.settings.max_length < least:
            raise StudyError(
                f"--max-length {self.settings.max_length}: an input of {source!r} has at least "
                f"{least} tokens, {special} of them of its own."
            )
        limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
        longest = min(limit for limit in limits if limit is not None)
        if self.settings.max_length > longest:
            raise StudyError(
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
            for name in ("teacher_epochs", "teacher_batch_size", "teacher_learning_rate"):
                values[name] = getattr(chosen, name)
            for name in ("teacher_seed", "group_by_length", "freeze_embeddings"):
                values[name] = getattr(chosen, name)
        return values

    @cached_property
    def _student_weights(self) -> str | None:
        return models.source_digest(self.settings.student or self.teacher_source)

    def student_settings(
        self, objective: Objective, seed: int, *, tuning: bool = False
    ) -> dict[str, Any]:
        """Everything a student depends on, by name."""
        chosen = objective.settings
        values = {**self.teacher_settings, "loss": objective.loss, "seed": seed}
        for name in ("epochs", "learning_rate", "batch_size", "freeze_embeddings"):
            values[name] = getattr(chosen, name)
        for name in ("group_by_length", "evaluate_every", "score"):
            values[name] = getattr(chosen, name)
        if chosen.student is None:
            values["student_layers"] = chosen.student_layers
        else:
            values["student"] = chosen.student
            values["student_weights"] = self._student_weights
        if tuning and self.tuning is not None:
            values["tuning_rows"] = self.tuning.train_rows
            values["held_out"] = self.tuning.held_out
        options = objective_options(objective.loss, chosen)
        return values | {f"loss.{name}": value for name, value in options.items()}

    def as_run(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``settings`` with the precision that is used where they leave it to the machine."""
        return {**settings, "precision": self.precision.name}

    @cached_property
    def precision(self) -> Precision:
        """The precision of every run, measured once if it is to be chosen."""
        if self.settings.precision != "auto":
            return Precision(self.settings.precision, "as asked for")
        path = self.folder / PRECISION_FILE
        precision = read_precision(path)
        if precision is None:
            rows = self.data.train.select(range(min(_PROBE_ROWS, len(self.data.train))))
            rows = encode(rows, self.student_tokenizer, self.settings.max_length)
            columns = [name for name in rows.column_names if name != "length"]
            batch = self.student_tokenizer.pad(rows.select_columns(columns)[:], return_tensors="pt")
            precision = measure_precision(self.build_student(0), dict(batch), device())
            write_precision(path, precision)
        if multiprocessing.parent_process() is None:  # its workers know it, too
            notice(f"Precision {precision.name}: {precision.reason}.")
        return precision

    def teacher_schedule(self) -> Schedule:
        """The schedule of the teacher's training."""
        chosen = self.settings
        return Schedule(
            epochs=chosen.teacher_epochs,
            batch_size=chosen.teacher_batch_size,
            learning_rate=chosen.teacher_learning_rate,
            seed=chosen.teacher_seed,
            bf16=self.precision.bf16,
            group_by_length=chosen.group_by_length,
        )

    def student_schedule(self, objective: Objective, seed: int) -> Schedule:
        """The schedule of a student's training."""
        chosen = objective.settings
        return Schedule(
            epochs=chosen.epochs,
            batch_size=chosen.batch_size,
            learning_rate=chosen.learning_rate,
            seed=seed,
            bf16=self.precision.bf16,
            group_by_length=chosen.group_by_length,
            evaluate_every=chosen.evaluate_every,
        )

    def train_rows(self, *, tuning: bool = False) -> int:
        """Number of rows a student is trained on."""
        if not tuning:
            return len(self.data.train)
        return len(self._tuning_split[0])

    @cached_property
    def teacher_rows(self) -> Rows:
        """All rows as the teacher reads them."""
        return self._rows(self.teacher_tokenizer)

    @cached_property
    def student_rows(self) -> Rows:
        """All rows as a student reads them."""
        if self.student_tokenizer is self.teacher_tokenizer:
            return self.teacher_rows
        return self._rows(self.student_tokenizer)

    def _rows(self, tokenizer: PreTrainedTokenizerBase) -> Rows:
        train, *dev = (
            encode(rows, tokenizer, self.settings.max_length)
            for rows in (self.data.train, *self.data.dev.values())
        )
        return Rows(
            train,
            {
                name: Predictor(rows, tokenizer, bf16=self.precision.bf16)
                for name, rows in zip(self.data.dev, dev, strict=True)
            },
            {name: torch.tensor(rows["label"][:]) for name, rows in self.data.dev.items()},
        )

    @cached_property
    def tuning_rows(self) -> Rows:
        """Some training rows to train on and some to score, as a student reads them."""
        train, held_out = self._tuning_split
        rows = self.student_rows.train
        predictor = Predictor(
            rows.select(held_out), self.student_tokenizer, bf16=self.precision.bf16
        )
        labels = torch.tensor(rows.select(held_out)["labels"][:])
        # Whatever the task's development splits are called, these rows are in the place of each.
        splits = self.task.dev_splits
        return Rows(
            rows.select(train),
            dict.fromkeys(splits, predictor),
            dict.fromkeys(splits, labels),
            train,
            held_out,
        )

    @cached_property
    def _tuning_split(self) -> tuple[list[int], list[int]]:
        if self.tuning is None:
            raise ValueError("this experiment has no tuning")
        order = list(range(len(self.data.train)))
        random.Random(SAMPLE_SEED).shuffle(order)
        held_out = max(1, round(len(order) * self.tuning.held_out))
        if held_out >= len(order):
            raise StudyError(
                f"[tuning] held_out = {self.tuning.held_out:g} leaves none of {len(order)} "
                "training rows to train on."
            )
        return order[held_out:][: self.tuning.train_rows], order[:held_out]
