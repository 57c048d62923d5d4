"""One teacher and one student: trained, evaluated, and kept where the next command finds them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from otkd.cli import models
from otkd.cli.console import CommandError, notice
from otkd.cli.machine import machine, versions
from otkd.cli.objectives import NEED_CLASS_ROWS, build_objective, objective_options
from otkd.cli.results import (
    Result,
    file_digest,
    find_result,
    mismatch_message,
    write_json,
    write_result,
)
from otkd.cli.training import Fit, fit, predict
from otkd.data import agreement, score
from otkd.signals import DenseSignal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.cli.experiment import Experiment

_TRAIN_LOGITS = "train-logits.safetensors"
_DEV_LOGITS = "dev-logits.safetensors"


@dataclass(frozen=True)
class Teacher:
    """A teacher whose logits are cached.

    Attributes:
        result: its result.
        train_logits: one entry per training row.
        dev_logits: one entry per development row, the splits one after the other.
        source: where its model can be loaded from.
    """

    result: Result
    train_logits: DenseSignal
    dev_logits: DenseSignal
    source: str

    @property
    def digest(self) -> str:
        """What tells one teacher's training logits from another's."""
        return self.result.teacher_logits


@dataclass(frozen=True)
class RunPaths:
    """Where a student's run leaves its traces.

    Attributes:
        result: the result file.
        work: checkpoints of a run under way; removed when it is done.
        model: where to save the student, or None to keep the numbers alone.
    """

    result: Path
    work: Path
    model: Path | None = None


def find_teacher(experiment: Experiment, folder: Path, *, overwrite: bool) -> Teacher | None:
    """The teacher that an earlier command left in ``folder``, or None if it is to be trained.

    Raises:
        CommandError: if it was made with other settings.
    """
    path = folder / "result.json"
    settings = experiment.teacher_settings
    result = find_result(path, settings, overwrite=overwrite, notice=notice)
    if result is None:
        check_work(folder / "work", settings, overwrite=overwrite)
        return None
    for name in {_TRAIN_LOGITS, _DEV_LOGITS, *result.files}:
        file = folder / name
        if not file.is_file() or file_digest(file) != result.files.get(name):
            notice(f"{file} is not the file that {path} was written with; the teacher is redone.")
            return None
    return Teacher(
        result,
        DenseSignal.load(folder / _TRAIN_LOGITS),
        DenseSignal.load(folder / _DEV_LOGITS),
        _teacher_model_source(experiment, folder),
    )


def train_teacher(experiment: Experiment, folder: Path, on_steps: Callable[[int], None]) -> Teacher:
    """Fine-tune the teacher, or take it as it is, and cache its logits in ``folder``."""
    chosen = experiment.settings
    seed = chosen.teacher_seed
    tokenizer = experiment.teacher_tokenizer
    model = models.load_classifier(experiment.teacher_source, experiment.task, seed)
    took = Fit(0, 0.0)
    # The result vouches for the files beside it, so it goes first and comes back last.
    (folder / "result.json").unlink(missing_ok=True)
    if chosen.finetune_teacher:
        if chosen.freeze_embeddings:
            models.freeze_embeddings(model)
        took = fit(
            model,
            experiment.teacher_train,
            tokenizer,
            experiment.schedule(teacher=True, seed=seed),
            _claim(folder / "work", experiment.teacher_settings),
            on_steps=on_steps,
        )
        save_model(folder / "model", model, tokenizer)
    train_logits = DenseSignal(
        predict(model, experiment.teacher_train, tokenizer, bf16=experiment.precision.bf16)
    )
    dev = experiment.predict_dev(model, teacher=True)
    dev_logits = DenseSignal(torch.cat(list(dev.values())))
    train_logits.save(folder / _TRAIN_LOGITS)
    dev_logits.save(folder / _DEV_LOGITS)
    kept = [folder / _TRAIN_LOGITS, folder / _DEV_LOGITS]
    kept += sorted((folder / "model").glob("*.safetensors")) if chosen.finetune_teacher else []
    files = {path.relative_to(folder).as_posix(): file_digest(path) for path in kept}
    metrics = score(experiment.task, dev, experiment.dev_labels)
    result = Result(
        loss="teacher",
        seed=seed,
        settings=experiment.teacher_settings,
        metrics=metrics,
        teacher_metrics=metrics,
        agreement=1.0,
        teacher_logits=files[_TRAIN_LOGITS],
        files=files,
        **_common_fields(experiment, took),
    )
    write_result(folder / "result.json", result)
    shutil.rmtree(folder / "work", ignore_errors=True)
    return Teacher(result, train_logits, dev_logits, _teacher_model_source(experiment, folder))


def _teacher_model_source(experiment: Experiment, folder: Path) -> str:
    fine_tuned = experiment.settings.finetune_teacher
    return str(folder / "model") if fine_tuned else experiment.teacher_source


def find_student(
    experiment: Experiment, paths: RunPaths, loss: str, seed: int, *, overwrite: bool
) -> Result | None:
    """The finished run at ``paths``, or None if it is to be done.

    Raises:
        CommandError: if it, or a run begun and not finished, has other settings.
    """
    settings = experiment.student_settings(loss, seed)
    result = find_result(paths.result, settings, overwrite=overwrite, notice=notice)
    if result is None:
        check_work(paths.work, settings, overwrite=overwrite)
    elif paths.model is not None and not (paths.model / "config.json").is_file():
        return None
    return result


def run_student(
    experiment: Experiment,
    teacher: Teacher,
    paths: RunPaths,
    loss: str,
    seed: int,
    on_steps: Callable[[int], None],
) -> Result:
    """Distil one student, evaluate it and write its result."""
    class_rows = None
    if loss in NEED_CLASS_ROWS:
        model = models.load_classifier(teacher.source, experiment.task, seed)
        class_rows = models.class_embedding(model)
    objective = build_objective(loss, objective_options(loss, experiment.settings), class_rows)
    settings = experiment.student_settings(loss, seed)
    student = experiment.build_student(seed)
    took = fit(
        student,
        experiment.student_train,
        experiment.student_tokenizer,
        experiment.schedule(teacher=False, seed=seed),
        _claim(paths.work, settings),
        loss=objective,
        teacher=teacher.train_logits,
        on_steps=on_steps,
    )
    dev = experiment.predict_dev(student, teacher=False)
    result = Result(
        loss=loss,
        seed=seed,
        settings=settings,
        metrics=score(experiment.task, dev, experiment.dev_labels),
        teacher_metrics=teacher.result.metrics,
        agreement=agreement(torch.cat(list(dev.values())), teacher.dev_logits.logits()),
        teacher_logits=teacher.digest,
        **_common_fields(experiment, took),
    )
    if paths.model is not None:
        save_model(paths.model, student, experiment.student_tokenizer)
    write_result(paths.result, result)
    shutil.rmtree(paths.work, ignore_errors=True)
    return result


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save model and tokenizer so that ``from_pretrained(folder)`` loads them; whole or not."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def check_work(work: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check that checkpoints in ``work``, if any, are of a run with these settings.

    With ``overwrite`` those of another are removed.

    Raises:
        CommandError: if they are of another run.
    """
    try:
        found = json.loads((work / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Nothing there, or stopped before its first step.
        shutil.rmtree(work, ignore_errors=True)
        return
    if found == settings:
        return
    if not overwrite:
        raise CommandError(mismatch_message(work, found, settings))
    shutil.rmtree(work)


def _claim(work: Path, settings: Mapping[str, Any]) -> Path:
    check_work(work, settings, overwrite=True)
    write_json(work / "settings.json", dict(settings))
    return work


def _common_fields(experiment: Experiment, took: Fit) -> dict[str, Any]:
    return {
        "task": experiment.task.name,
        "headline": experiment.task.headline,
        "rows": {"train": len(experiment.data.train), "dev": experiment.data.dev_rows},
        "steps": took.steps,
        "seconds": took.seconds,
        "precision": experiment.precision.name,
        "versions": versions(),
        "machine": machine(),
    }
