"""The teacher: found or trained, its outputs cached where the next command finds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkd.cli import models
from otkd.cli.console import CommandError, notice
from otkd.cli.evaluation import Predictor
from otkd.cli.ownership import remove
from otkd.cli.results import Result, file_digest, find_result, write_result
from otkd.cli.traces import check_work, claim, common_fields, save_model
from otkd.cli.training import Fit, device, fit
from otkd.data import majority_score, score
from otkd.signals import DenseSignal
from otkd.signals.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from otkd.cli.experiment import Experiment, Rows

_TRAIN_LOGITS = "train-logits.safetensors"
_DEV_LOGITS = "dev-logits.safetensors"
_CLASS_ROWS = "class-rows.safetensors"
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
    train: DenseSignal
    dev_logits: DenseSignal
    class_rows: Tensor
    features: Tensor | None = None

    @property
    def digest(self) -> str:
        """What tells one teacher's training logits from another's."""
        return self.result.teacher_logits

    def on(self, rows: Rows, *, features: bool) -> DenseSignal:
        """What it says of the training rows, with its states if they are asked for."""
        index = slice(None) if rows.index is None else torch.tensor(rows.index)
        signal = self.train[index]
        if features and self.features is not None:
            signal = DenseSignal(signal.values, self.features[index])
        return signal

    def on_dev(self, rows: Rows) -> Tensor:
        """Its logits on the rows that score a student, the splits one after the other."""
        if rows.held_out is None:
            return self.dev_logits.logits()
        return self.train[torch.tensor(rows.held_out)].logits().repeat(len(rows.dev), 1)


def teacher_files(folder: Path) -> list[Path]:
    """Every file that a teacher leaves in ``folder``."""
    names = ("result.json", _TRAIN_LOGITS, _DEV_LOGITS, _CLASS_ROWS, _FEATURES)
    return [folder / name for name in names]


def teacher_folders(folder: Path) -> list[Path]:
    """Every folder that a teacher makes in ``folder``: its weights, its checkpoints."""
    return [folder / "model", unfinished(folder)]


def unfinished(folder: Path) -> Path:
    """Where a teacher keeps its checkpoints while it is trained."""
    return folder / _UNFINISHED


def find_teacher(experiment: Experiment, folder: Path, *, overwrite: bool) -> Teacher | None:
    """The teacher that an earlier command left in ``folder``, or None if it is to be trained.

    Raises:
        CommandError: if it was made with other settings.
    """
    path = folder / "result.json"
    settings = experiment.as_run(experiment.teacher_settings)
    result = find_result(path, settings, overwrite=overwrite, notice=notice)
    if result is None:
        check_work(unfinished(folder), settings, overwrite=overwrite)
        return None
    # Its weights are not asked for: they are needed for states alone, and not always kept.
    for name in (_TRAIN_LOGITS, _DEV_LOGITS, _CLASS_ROWS):
        file = folder / name
        if not file.is_file() or file_digest(file) != result.files.get(name):
            notice(f"{file} is not the file that {path} was written with; the teacher is redone.")
            return None
    return _load_teacher(folder, result)


def train_teacher(experiment: Experiment, folder: Path, on_steps: Callable[[int], None]) -> Teacher:
    """Fine-tune the teacher, or take it as it is, and cache its outputs in ``folder``."""
    chosen = experiment.settings
    seed = chosen.teacher_seed
    tokenizer = experiment.teacher_tokenizer
    rows = experiment.teacher_rows
    model = models.load_classifier(experiment.teacher_source, experiment.task, seed)
    took = Fit(0, 0.0)
    # The result vouches for the files beside it, so it goes first and comes back last.
    (folder / "result.json").unlink(missing_ok=True)
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
        save_model(folder / "model", model, tokenizer)
    train = Predictor(rows.train, tokenizer, bf16=experiment.precision.bf16).logits(model)
    dev = rows.predict(model)
    DenseSignal(train).save(folder / _TRAIN_LOGITS)
    DenseSignal(torch.cat(list(dev.values()))).save(folder / _DEV_LOGITS)
    save_tensors(folder / _CLASS_ROWS, {"class_rows": models.class_embedding(model)})
    kept = [folder / name for name in (_TRAIN_LOGITS, _DEV_LOGITS, _CLASS_ROWS)]
    kept += sorted((folder / "model").glob("*.safetensors")) if chosen.finetune_teacher else []
    files = {path.relative_to(folder).as_posix(): file_digest(path) for path in kept}
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
    write_result(folder / "result.json", result)
    remove(unfinished(folder))
    return _load_teacher(folder, result)


def _load_teacher(folder: Path, result: Result) -> Teacher:
    path = folder / _FEATURES
    return Teacher(
        result,
        DenseSignal.load(folder / _TRAIN_LOGITS),
        DenseSignal.load(folder / _DEV_LOGITS),
        load_tensors(folder / _CLASS_ROWS, "class_rows")[0]["class_rows"],
        load_tensors(path, "features")[0]["features"] if path.is_file() else None,
    )


def with_features(experiment: Experiment, folder: Path, teacher: Teacher) -> Teacher:
    """The teacher with its states on the training rows, which are kept in ``folder``.

    Raises:
        CommandError: if its weights, which give them, are gone.
    """
    if teacher.features is not None:
        return teacher
    source = experiment.teacher_source
    if experiment.settings.finetune_teacher:
        source = str(folder / "model")
        weights = [folder / name for name in teacher.result.files if name.startswith("model/")]
        if not all(path.is_file() for path in weights):
            raise CommandError(
                "A loss compares states, and the weights of the teacher that give them are not in "
                f"{folder}. Remove that folder to train it again, and the students with it; or "
                "leave such losses out."
            )
    model = models.load_classifier(source, experiment.task, teacher.result.seed)
    model.to(device())  # pyright: ignore[reportArgumentType]
    rows, tokenizer = experiment.teacher_rows.train, experiment.teacher_tokenizer
    predictor = Predictor(rows, tokenizer, bf16=experiment.precision.bf16)
    save_tensors(folder / _FEATURES, {"features": predictor.features(model).half()})
    return _load_teacher(folder, teacher.result)
