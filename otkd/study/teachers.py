"""The teacher: found or trained, with its outputs in files for later commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkd.files import changed_file, file_digest, file_digests, files_below
from otkd.study import models
from otkd.study.messages import StudyError, notice
from otkd.study.ownership import remove
from otkd.study.prediction import Predictor
from otkd.study.provenance import provenance
from otkd.study.results import Result, write_result
from otkd.study.reuse import find_result
from otkd.study.training import DivergedError, Fit, device, fit
from otkd.study.work import check_work, claim, save_model
from otkd.tasks import majority_score, score
from otkd.teachers import DenseTeacher
from otkd.teachers.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from otkd.study.experiment import Experiment, Rows

_RESULT = "result.json"
_MODEL = "model"
_TRAIN_LOGITS = "train-logits.safetensors"
_DEV_LOGITS = "dev-logits.safetensors"
_CLASS_ROWS = "class-rows.safetensors"
_FEATURES = "train-features.safetensors"
_OUTPUTS = (_TRAIN_LOGITS, _DEV_LOGITS, _CLASS_ROWS)
_UNFINISHED = "result.partial"


@dataclass(frozen=True)
class Teacher:
    """A teacher whose outputs are stored.

    Attributes:
        result: its result.
        train: logits, one entry per training row.
        dev_logits: one entry per development row, the splits one after the other.
        class_rows: the weight of its classification head, one row per class.
        features: its states on the training rows; see :func:`with_features`.
    """

    result: Result
    train: DenseTeacher
    dev_logits: DenseTeacher
    class_rows: Tensor
    features: Tensor | None = None

    def on(self, rows: Rows, *, features: bool) -> DenseTeacher:
        """Its outputs on the training rows, with its states if ``features`` is true."""
        index = slice(None) if rows.index is None else torch.tensor(rows.index)
        stored = self.train[index]
        if features and self.features is not None:
            return DenseTeacher(stored.values, self.features[index])
        return stored

    def on_dev(self, rows: Rows) -> Tensor:
        """Its logits on the rows that score a student, the splits one after the other."""
        if rows.held_out is None:
            return self.dev_logits.logits()
        return self.train[torch.tensor(rows.held_out)].logits().repeat(len(rows.dev), 1)


def teacher_files(folder: Path) -> list[Path]:
    """Every file that a teacher has in ``folder``."""
    return [folder / name for name in (_RESULT, *_OUTPUTS, _FEATURES)]


def teacher_folders(folder: Path) -> list[Path]:
    """Every folder that a teacher has in ``folder``: its weights, its checkpoints."""
    return [folder / _MODEL, folder / _UNFINISHED]


def find_teacher(experiment: Experiment, folder: Path, *, overwrite: bool) -> Teacher | None:
    """The teacher of an earlier command in ``folder``, or None if it is to be trained.

    Raises:
        StudyError: if it was made with other settings.
    """
    path = folder / _RESULT
    settings = experiment.as_run(experiment.teacher_settings)
    result = find_result(path, settings, loss="teacher", overwrite=overwrite)
    if result is None:
        check_work(folder / _UNFINISHED, settings, overwrite=overwrite)
        return None
    files = {name: result.files.get(name, "") for name in _OUTPUTS} | result.files
    # States can be computed again from the weights. The weights serve no other purpose and may be
    # missing, but those that are there must be the teacher's.
    files.pop(_FEATURES, None)
    if not files_below(folder / _MODEL):
        files = {name: digest for name, digest in files.items() if not _is_weights(name)}
    try:
        changed = changed_file(folder, files)
        if changed is not None:
            raise ValueError(f"{changed} is not the file that {path} was written with")
        return _load_teacher(experiment, folder, result)
    except ValueError as error:
        notice(f"{error}; the teacher is redone.")
        return None


def train_teacher(experiment: Experiment, folder: Path, on_steps: Callable[[int], None]) -> Teacher:
    """Fine-tune the teacher, or use it unchanged, and store its outputs in ``folder``.

    Raises:
        StudyError: if its training diverges, or its logits are not finite.
    """
    try:
        return _train_teacher(experiment, folder, on_steps)
    except (DivergedError, FloatingPointError) as error:
        remedy = f"lower --teacher-learning-rate ({experiment.settings.teacher_learning_rate:g})"
        if not experiment.settings.finetune_teacher:
            remedy = f"use another --teacher than {experiment.teacher_source}"
        raise StudyError(f"The teacher diverged, {error}: {remedy}.") from error


def _train_teacher(
    experiment: Experiment, folder: Path, on_steps: Callable[[int], None]
) -> Teacher:
    chosen, task = experiment.settings, experiment.task
    tokenizer, rows = experiment.teacher_tokenizer, experiment.teacher_rows
    work, took = folder / _UNFINISHED, Fit(0, 0.0)
    model = models.load_classifier(experiment.teacher_source, task, chosen.teacher_seed)
    # The result has the hashes of the files beside it, so it is removed first and written last.
    (folder / _RESULT).unlink(missing_ok=True)
    (folder / _FEATURES).unlink(missing_ok=True)
    if chosen.finetune_teacher:
        if chosen.freeze_embeddings:
            models.freeze_embeddings(model)
        claim(work, experiment.as_run(experiment.teacher_settings))
        schedule = experiment.teacher_schedule()
        took = fit(model, rows.train, tokenizer, schedule, work, on_steps=on_steps)
        save_model(folder / _MODEL, model, tokenizer)
    train = Predictor(rows.train, tokenizer, bf16=experiment.precision.bf16).logits(model)
    dev = rows.predict(model)
    DenseTeacher(train).save(folder / _TRAIN_LOGITS)
    DenseTeacher(torch.cat(list(dev.values()))).save(folder / _DEV_LOGITS)
    class_rows = models.class_head(model).weight.detach().clone()
    save_tensors(folder / _CLASS_ROWS, {"class_rows": class_rows})
    weights = files_below(folder / _MODEL) if chosen.finetune_teacher else []
    files = file_digests(folder, [*(folder / name for name in _OUTPUTS), *weights])
    metrics = score(task, dev, rows.labels)
    labels = torch.tensor(rows.train["labels"][:])
    result = Result(
        loss="teacher",
        seed=chosen.teacher_seed,
        settings=experiment.teacher_settings,
        metrics=metrics,
        teacher_metrics=metrics,
        majority_metrics=majority_score(task, labels, rows.labels),
        agreement=1.0,
        teacher_logits=files[_TRAIN_LOGITS],
        files=files,
        **provenance(experiment, rows, took),
    )
    write_result(folder / _RESULT, result)
    remove(work)
    return _load_teacher(experiment, folder, result)


def _load_teacher(experiment: Experiment, folder: Path, result: Result) -> Teacher:
    """The teacher whose files have been compared with their hashes.

    Raises:
        ValueError: if they do not hold numbers for these rows and classes.
    """
    data, classes = experiment.data, experiment.task.num_labels
    train, dev = (DenseTeacher.load(folder / name) for name in (_TRAIN_LOGITS, _DEV_LOGITS))
    rows = load_tensors(folder / _CLASS_ROWS, "class_rows")[0]["class_rows"]
    _check(folder / _TRAIN_LOGITS, train.values, (len(data.train), classes))
    _check(folder / _DEV_LOGITS, dev.values, (data.dev_rows, classes))
    _check(folder / _CLASS_ROWS, rows, (classes, *rows.shape[-1:]))
    features = None
    if (folder / _FEATURES).is_file() and _FEATURES in result.files:
        features = _load_features(folder / _FEATURES, result.files[_FEATURES], len(data.train))
    return Teacher(result, train, dev, rows, features)


def _load_features(path: Path, digest: str, rows: int) -> Tensor | None:
    """The stored states, or None if they are to be computed again."""
    try:
        if file_digest(path) != digest:
            raise ValueError(f"{path} is not the file that was written")
        features = load_tensors(path, "features")[0]["features"]
        _check(path, features, (rows, *features.shape[-1:]))
    except ValueError as error:
        notice(f"{error}; if a loss needs the teacher's states, they are computed again.")
        return None
    return features


def _check(path: Path, values: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(values.shape) != shape or not values.is_floating_point():
        raise ValueError(
            f"{path} holds {values.dtype} of shape {tuple(values.shape)}, not floating-point "
            f"numbers of shape {shape}"
        )
    if not values.isfinite().all():
        raise ValueError(f"{path} holds numbers that are not finite")


def _is_weights(name: str) -> bool:
    return name.startswith(f"{_MODEL}/")


def with_features(experiment: Experiment, folder: Path, teacher: Teacher) -> Teacher:
    """The teacher with its states on the training rows, which are stored in ``folder``.

    Raises:
        StudyError: if the weights that compute them are missing or not the teacher's.
    """
    if teacher.features is not None:
        return teacher
    path, files = folder / _FEATURES, teacher.result.files
    if _FEATURES not in files and path.exists():
        notice(f"{path} is not listed in {folder / _RESULT} and is computed again.")
    source = experiment.teacher_source
    if experiment.settings.finetune_teacher:
        source = str(folder / _MODEL)
        weights = {name: digest for name, digest in files.items() if _is_weights(name)}
        if not weights or changed_file(folder, weights) is not None:
            raise StudyError(
                "A loss compares states, and the weights of the teacher, which compute them, are "
                f"not in {folder}. Remove that folder to train teacher and students again, or "
                "leave such losses out."
            )
    model = models.load_classifier(source, experiment.task, teacher.result.seed)
    model.to(device())  # pyright: ignore[reportArgumentType]
    rows, tokenizer = experiment.teacher_rows.train, experiment.teacher_tokenizer
    try:
        states = Predictor(rows, tokenizer, bf16=experiment.precision.bf16).features(model)
    except FloatingPointError as error:
        raise StudyError(f"A loss compares states, but {error}: leave it out.") from error
    half = states.half()
    save_tensors(path, {"features": half if half.isfinite().all() else states})
    result = dataclasses.replace(teacher.result, files={**files, _FEATURES: file_digest(path)})
    write_result(folder / _RESULT, result)
    return _load_teacher(experiment, folder, result)
