"""The teacher: found or trained, its outputs cached where the next command finds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkd.study import models
from otkd.study.evaluation import Predictor
from otkd.study.messages import StudyError, notice
from otkd.study.ownership import remove
from otkd.study.results import (
    Result,
    changed_file,
    file_digest,
    file_digests,
    files_below,
    find_result,
    write_result,
)
from otkd.study.traces import check_work, claim, common_fields, save_model
from otkd.study.training import DivergedError, Fit, device, fit
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
# What every student may need, by the names in the result.
_OUTPUTS = (_TRAIN_LOGITS, _DEV_LOGITS, _CLASS_ROWS)
_FEATURES = "train-features.safetensors"
_UNFINISHED = "result.partial"


@dataclass(frozen=True)
class Teacher:
    """A teacher whose outputs are cached.

    Attributes:
        result: its result.
        train: logits, one entry per training row.
        dev_logits: one entry per development row, the splits one after the other.
        class_rows: the weight of the layer that gives its logits, a row a class.
        features: its states on the training rows; see :func:`with_features`.
    """

    result: Result
    train: DenseTeacher
    dev_logits: DenseTeacher
    class_rows: Tensor
    features: Tensor | None = None

    @property
    def digest(self) -> str:
        """What tells one teacher's training logits from another's."""
        return self.result.teacher_logits

    def on(self, rows: Rows, *, features: bool) -> DenseTeacher:
        """What it says of the training rows, with its states if they are asked for."""
        index = slice(None) if rows.index is None else torch.tensor(rows.index)
        signal = self.train[index]
        if features and self.features is not None:
            signal = DenseTeacher(signal.values, self.features[index])
        return signal

    def on_dev(self, rows: Rows) -> Tensor:
        """Its logits on the rows that score a student, the splits one after the other."""
        if rows.held_out is None:
            return self.dev_logits.logits()
        return self.train[torch.tensor(rows.held_out)].logits().repeat(len(rows.dev), 1)


def teacher_files(folder: Path) -> list[Path]:
    """Every file that a teacher leaves in ``folder``."""
    names = (_RESULT, _TRAIN_LOGITS, _DEV_LOGITS, _CLASS_ROWS, _FEATURES)
    return [folder / name for name in names]


def teacher_folders(folder: Path) -> list[Path]:
    """Every folder that a teacher makes in ``folder``: its weights, its checkpoints."""
    return [folder / _MODEL, unfinished(folder)]


def unfinished(folder: Path) -> Path:
    """Where a teacher keeps its checkpoints while it is trained."""
    return folder / _UNFINISHED


def find_teacher(experiment: Experiment, folder: Path, *, overwrite: bool) -> Teacher | None:
    """The teacher that an earlier command left in ``folder``, or None if it is to be trained.

    Raises:
        StudyError: if it was made with other settings.
    """
    path = folder / _RESULT
    settings = experiment.as_run(experiment.teacher_settings)
    result = find_result(
        path,
        settings,
        loss="teacher",
        overwrite=overwrite,
        notice=notice,
    )
    if result is None:
        check_work(unfinished(folder), settings, overwrite=overwrite)
        return None
    files = {name: result.files.get(name, "") for name in _OUTPUTS} | result.files
    # States can be had again from the weights; these are needed for nothing else, and not always
    # kept. If some are there, they are to be the teacher's.
    files.pop(_FEATURES, None)
    if not files_below(folder / _MODEL):
        files = {name: digest for name, digest in files.items() if not _is_weights(name)}
    changed = changed_file(folder, files)
    if changed is not None:
        notice(f"{changed} is not the file that {path} was written with; the teacher is redone.")
        return None
    try:
        return _load_teacher(experiment, folder, result)
    except ValueError as error:
        notice(f"{error}; the teacher is redone.")
        return None


def train_teacher(experiment: Experiment, folder: Path, on_steps: Callable[[int], None]) -> Teacher:
    """Fine-tune the teacher, or take it as it is, and cache its outputs in ``folder``.

    Raises:
        StudyError: if its training diverges, or its logits are not finite.
    """
    try:
        return _train_teacher(experiment, folder, on_steps)
    except (DivergedError, FloatingPointError) as error:
        remedy = f"lower --teacher-learning-rate ({experiment.settings.teacher_learning_rate:g})"
        if not experiment.settings.finetune_teacher:
            remedy = f"name another than {experiment.teacher_source} with --teacher"
        raise StudyError(f"The teacher diverged, {error}: {remedy}.") from error


def _train_teacher(
    experiment: Experiment, folder: Path, on_steps: Callable[[int], None]
) -> Teacher:
    chosen = experiment.settings
    seed = chosen.teacher_seed
    tokenizer = experiment.teacher_tokenizer
    rows = experiment.teacher_rows
    model = models.load_classifier(experiment.teacher_source, experiment.task, seed)
    took = Fit(0, 0.0)
    # The result vouches for the files beside it, so it goes first and comes back last.
    (folder / _RESULT).unlink(missing_ok=True)
    (folder / _FEATURES).unlink(missing_ok=True)
    if chosen.finetune_teacher:
        if chosen.freeze_embeddings:
            models.freeze_embeddings(model)
        took = fit(
            model,
            rows.train,
            tokenizer,
            experiment.teacher_schedule(),
            claim(unfinished(folder), experiment.as_run(experiment.teacher_settings)),
            on_steps=on_steps,
        )
        save_model(folder / _MODEL, model, tokenizer)
    train = Predictor(rows.train, tokenizer, bf16=experiment.precision.bf16).logits(model)
    dev = rows.predict(model)
    DenseTeacher(train).save(folder / _TRAIN_LOGITS)
    DenseTeacher(torch.cat(list(dev.values()))).save(folder / _DEV_LOGITS)
    save_tensors(folder / _CLASS_ROWS, {"class_rows": models.class_embedding(model)})
    kept = [folder / name for name in _OUTPUTS]
    files = file_digests(
        folder, kept + (files_below(folder / _MODEL) if chosen.finetune_teacher else [])
    )
    metrics = score(experiment.task, dev, rows.labels)
    labels = torch.tensor(rows.train["labels"][:])
    result = Result(
        loss="teacher",
        seed=seed,
        settings=experiment.teacher_settings,
        metrics=metrics,
        teacher_metrics=metrics,
        majority_metrics=majority_score(experiment.task, labels, rows.labels),
        agreement=1.0,
        teacher_logits=files[_TRAIN_LOGITS],
        files=files,
        **common_fields(experiment, rows, took),
    )
    write_result(folder / _RESULT, result)
    remove(unfinished(folder))
    return _load_teacher(experiment, folder, result)


def _load_teacher(experiment: Experiment, folder: Path, result: Result) -> Teacher:
    """The teacher whose files were found to be as they were written.

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
    if _FEATURES in result.files:
        features = _load_features(folder, result.files[_FEATURES], len(data.train))
    return Teacher(result, train, dev, rows, features)


def _load_features(folder: Path, digest: str, rows: int) -> Tensor | None:
    """The stored states, or None if they are to be computed again."""
    path = folder / _FEATURES
    if not path.is_file():
        return None
    try:
        if file_digest(path) != digest:
            raise ValueError(f"{path} is not the file that was written")
        features = load_tensors(path, "features")[0]["features"]
        _check(path, features, (rows, *features.shape[-1:]))
    except ValueError as error:
        notice(f"{error}; where a loss needs the teacher's states, they are computed again.")
        return None
    return features


def _check(path: Path, values: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(values.shape) != shape or not values.is_floating_point():
        raise ValueError(
            f"{path} holds {values.dtype} of shape {tuple(values.shape)}, not numbers of shape "
            f"{shape}"
        )
    if not values.isfinite().all():
        raise ValueError(f"{path} holds numbers that are not finite")


def _is_weights(name: str) -> bool:
    return name.startswith(f"{_MODEL}/")


def with_features(experiment: Experiment, folder: Path, teacher: Teacher) -> Teacher:
    """The teacher with its states on the training rows, which are kept in ``folder``.

    Raises:
        StudyError: if its weights, which give them, are gone or are not the teacher's.
    """
    if teacher.features is not None:
        return teacher
    if _FEATURES not in teacher.result.files and (folder / _FEATURES).exists():
        notice(f"{folder / _FEATURES} is not listed in {folder / _RESULT} and is computed again.")
    source = experiment.teacher_source
    if experiment.settings.finetune_teacher:
        source = str(folder / _MODEL)
        weights = {
            name: digest for name, digest in teacher.result.files.items() if _is_weights(name)
        }
        if not weights or changed_file(folder, weights) is not None:
            raise StudyError(
                "A loss compares states, and the weights of the teacher that give them are not in "
                f"{folder}. Remove that folder to train it again, and the students with it; or "
                "leave such losses out."
            )
    model = models.load_classifier(source, experiment.task, teacher.result.seed)
    model.to(device())  # pyright: ignore[reportArgumentType]
    rows, tokenizer = experiment.teacher_rows.train, experiment.teacher_tokenizer
    predictor = Predictor(rows, tokenizer, bf16=experiment.precision.bf16)
    try:
        states = predictor.features(model)
    except FloatingPointError as error:
        raise StudyError(f"A loss compares states, but {error}: leave it out.") from error
    # Half the size where half precision can hold them.
    half = states.half()
    save_tensors(folder / _FEATURES, {"features": half if half.isfinite().all() else states})
    files = {**teacher.result.files, _FEATURES: file_digest(folder / _FEATURES)}
    result = dataclasses.replace(teacher.result, files=files)
    write_result(folder / _RESULT, result)
    return _load_teacher(experiment, folder, result)
