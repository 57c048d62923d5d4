"""What all runs of a task share: its rows, the sources of the models, the settings."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otkd.files import write_json
from otkd.study import models
from otkd.study.interface import Rows, TaskKind
from otkd.study.messages import StudyError, notice
from otkd.study.objectives import build_objective, objective_options
from otkd.study.prediction import (
    PRECISION_FILE,
    Precision,
    emulates_bf16,
    measure_precision,
    read_precision,
    supports_bf16,
)
from otkd.study.training import Schedule, device
from otkd.tasks import SAMPLE_SEED, get_task

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from otkd.study.protocols import Objective, Tuning
    from otkd.study.settings import Settings

_MOST_PROBE_ROWS = 16
# The settings, beside data and models, that decide the outputs of a teacher, and a student.
_OF_TEACHER = ("teacher_epochs", "teacher_batch_size", "teacher_learning_rate", "teacher_seed")
_OF_TEACHER += ("group_by_length", "freeze_embeddings")
_OF_ROUGE = ("rouge_rows", "rouge_seed", "answer_tokens")
_OF_STUDENT = ("epochs", "learning_rate", "batch_size", "freeze_embeddings", "group_by_length")
_OF_STUDENT += ("evaluate_every", "score")


class Experiment(TaskKind):
    """The parts of a study of one task that do not depend on loss and seed, checked when made.

    A subclass knows one kind of task. :func:`otkd.study.kinds.make_experiment` chooses it.

    Args:
        settings: shared by all losses.
        objectives: the losses with their own settings.
        folder: of the results.
        tuning: how the candidates of the losses are compared, if they have any.

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
    ) -> None:
        settings.check()
        self.settings, self.objectives = settings, objectives
        self.folder, self.tuning = folder, tuning
        self.task: Any = get_task(settings.task)
        self._check_objectives()
        if settings.precision == "bf16" and not supports_bf16():
            raise StudyError("--precision bf16: the accelerator does not support it.")
        if settings.precision == "bf16" and emulates_bf16() and _is_first_process():
            notice(
                "--precision bf16: this processor has no instructions for it, so it may take "
                "several times as long as fp32."
            )
        self.data = self._load_data()
        self.teacher_source = self._teacher_source()
        self.teacher_tokenizer = self._tokenizer(self.teacher_source)
        self.student_tokenizer = self._student_tokenizer()
        self._check_teacher()
        # Their errors should come before the training of a teacher, which may take an hour.
        self.build_student(0)
        if any(objective.candidates for objective in objectives):
            self.train_rows(tuning=True)

    def _tokenizer(self, source: str) -> PreTrainedTokenizerBase:
        tokenizer = models.load("AutoTokenizer", source)
        config = models.load("AutoConfig", source)
        if tokenizer.pad_token is None and self.pads_with_end:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise StudyError(
                f"The tokenizer of {source!r} has no padding token: set its pad_token and save it "
                "with save_pretrained."
            )
        length = self.settings.max_length
        least, reason = self._least_length(tokenizer)
        if length < least:
            raise StudyError(
                f"--max-length {length}: an input of {source!r} has at least {least} tokens"
                f"{reason}."
            )
        limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
        longest = min(limit for limit in limits if limit is not None)
        if length > longest:
            raise StudyError(f"--max-length {length}: {source!r} reads at most {longest} tokens.")
        return tokenizer

    @cached_property
    def teacher_settings(self) -> dict[str, Any]:
        """Everything that the teacher's outputs depend on, by name."""
        chosen = self.settings
        return {
            "task": self.task.name,
            "data_digest": self.data.digest(),
            "train_rows": len(self.data.train),
            "dev_rows": self.data.dev_rows,
            "max_length": chosen.max_length,
            "precision": chosen.precision,
            "teacher": chosen.teacher or self.default_teacher,
            "teacher_weights": models.source_digest(self.teacher_source),
            "finetune_teacher": chosen.finetune_teacher,
            # What the teacher reads is cut where the student's tokens are.
            **_values(chosen, ("student_vocabulary",) if chosen.student_vocabulary else ()),
            **_values(chosen, _OF_TEACHER if chosen.finetune_teacher else ()),
            **_values(chosen, _OF_ROUGE if chosen.rouge_rows is not None else ()),
        }

    @cached_property
    def _student_weights(self) -> str | None:
        return models.source_digest(self.settings.student or self.teacher_source)

    def student_settings(
        self, objective: Objective, seed: int, *, tuning: bool = False
    ) -> dict[str, Any]:
        """Everything that a student depends on, by name."""
        chosen = objective.settings
        values = {**self.teacher_settings, "loss": objective.loss, "seed": seed}
        values |= _values(chosen, _OF_STUDENT)
        if chosen.warmup:  # results that were made before this setting existed have none
            values["warmup"] = chosen.warmup
        if chosen.student is None:
            values["student_layers"] = chosen.student_layers
        else:
            values |= {"student": chosen.student, "student_weights": self._student_weights}
        if tuning and self.tuning is not None:
            values |= {"tuning_rows": self.tuning.train_rows, "held_out": self.tuning.held_out}
        options = objective_options(objective.loss, chosen)
        return values | {f"loss.{name}": value for name, value in options.items()}

    def build_loss(
        self,
        name: str,
        options: Mapping[str, Any],
        embedding: Tensor,
        widths: tuple[int, int] | None = None,
    ) -> nn.Module:
        """The loss of a student; see :func:`~otkd.study.objectives.build_objective`."""
        return build_objective(name, options, embedding, widths)

    def as_run(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``settings`` with the precision in use instead of ``auto``."""
        return {**settings, "precision": self.precision.name}

    @cached_property
    def precision(self) -> Precision:
        """The precision of every run; ``auto`` is measured once and kept in the folder."""
        if self.settings.precision != "auto":
            return Precision(self.settings.precision, "as requested")
        path = self.folder / PRECISION_FILE
        precision = read_precision(path)
        if precision is None:
            tokenizer = self.student_tokenizer
            probe = self.data.head(min(_MOST_PROBE_ROWS, self.settings.batch_size))
            rows = self.encoded(probe, tokenizer).remove_columns("length")
            batch = self.collator(tokenizer)([*rows])
            precision = measure_precision(self.build_student(0), dict(batch), device())
            write_json(path, asdict(precision))
        if _is_first_process():
            notice(f"Precision {precision.name}: {precision.reason}.")
        return precision

    def teacher_schedule(self) -> Schedule:
        """The schedule of the teacher's training."""
        chosen, bf16 = self.settings, self.precision.bf16
        pace = chosen.teacher_epochs, chosen.teacher_batch_size, chosen.teacher_learning_rate
        return Schedule(*pace, chosen.teacher_seed, bf16, chosen.group_by_length)

    def student_schedule(self, objective: Objective, seed: int) -> Schedule:
        """The schedule of a student's training."""
        chosen, bf16 = objective.settings, self.precision.bf16
        pace = chosen.epochs, chosen.batch_size, chosen.learning_rate
        return Schedule(
            *pace, seed, bf16, chosen.group_by_length, chosen.evaluate_every, chosen.warmup
        )

    def train_rows(self, *, tuning: bool = False) -> int:
        """Number of training rows of a student."""
        return len(self._tuning_split[0] if tuning else self.data.train)

    @cached_property
    def teacher_rows(self) -> Rows:
        """All rows, encoded for the teacher."""
        return self._rows(self.teacher_tokenizer)

    @cached_property
    def student_rows(self) -> Rows:
        """All rows, encoded for a student."""
        if self.student_tokenizer is self.teacher_tokenizer:
            return self.teacher_rows
        return self._rows(self.student_tokenizer)

    def _rows(self, tokenizer: PreTrainedTokenizerBase) -> Rows:
        dev = {name: self.encoded(rows, tokenizer) for name, rows in self.data.dev.items()}
        return Rows(
            self.encoded(self.data.train, tokenizer),
            {name: self.prepared(rows, tokenizer) for name, rows in dev.items()},
        )

    @cached_property
    def tuning_rows(self) -> Rows:
        """Some training rows to train on and others to score, encoded for a student."""
        index, held_out = self._tuning_split
        train = self.student_rows.train
        scored = self.prepared(train.select(held_out), self.student_tokenizer)
        # The same rows are used instead of each of the task's development splits.
        return Rows(train.select(index), dict.fromkeys(self.data.dev, scored), index, held_out)

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


def _is_first_process() -> bool:
    """Whether this is not a worker, which would repeat a notice."""
    return multiprocessing.parent_process() is None


def _values(settings: Settings, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}
