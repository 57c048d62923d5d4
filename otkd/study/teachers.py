"""The teacher: found or trained, with its outputs in files for later commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otkd.files import changed_file, file_digest, file_digests, files_below
from otkd.study import models
from otkd.study.answers import WORK as ANSWERS_WORK
from otkd.study.answers import answer_batches, answers_file, generate_answers, load_answers
from otkd.study.classification import ClassificationExperiment, check_stored
from otkd.study.messages import StudyError, notice
from otkd.study.objectives import needs_answers, needs_features
from otkd.study.ownership import remove
from otkd.study.provenance import provenance
from otkd.study.results import Result, write_result
from otkd.study.reuse import find_result
from otkd.study.training import DivergedError, Fit, fit
from otkd.study.work import check_work, claim, save_model
from otkd.teachers import DenseTeacher, StoredTeacher
from otkd.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otkd.study.experiment import Experiment
    from otkd.study.interface import Rows
    from otkd.study.runs import Run
    from otkd.study.workers import Progress

_RESULT = "result.json"
_MODEL = "model"
_FEATURES = "train-features.safetensors"
_UNFINISHED = "result.partial"


@dataclass(frozen=True)
class Teacher:
    """A teacher whose outputs are stored.

    Attributes:
        result: its result.
        train: outputs, one entry per training row.
        dev: outputs, one entry per development row, the splits one after the other.
        embedding: its class or token embeddings, one row each.
        features: its states on the training rows, if a loss needs them.
        answers: its own answers to the prompts of the training rows, likewise.
    """

    result: Result
    train: StoredTeacher
    dev: StoredTeacher
    embedding: Tensor
    features: Tensor | None = None
    answers: tuple[str, ...] | None = None

    def lacks(self, run: Run) -> bool:
        """Whether a run needs states or answers that :func:`completed` adds."""
        features = self.features is None and needs_features(run.options)
        return features or (self.answers is None and needs_answers(run.objective.loss))

    def on(self, rows: Rows, *, features: bool) -> StoredTeacher:
        """Its outputs on the training rows, with its states if ``features`` is true."""
        # All rows are not copied: the states of a language task may fill most of the memory.
        index = None if rows.index is None else torch.tensor(rows.index)
        stored = self.train if index is None else self.train[index]
        if features and self.features is not None:
            chosen = self.features if index is None else self.features[index]
            return DenseTeacher(stored.logits(), chosen)
        return stored

    def on_dev(self, rows: Rows) -> StoredTeacher:
        """Its outputs on the rows that score a student, the splits one after the other."""
        return self.dev if rows.held_out is None else self.train[torch.tensor(rows.held_out)]


def teacher_files(folder: Path, experiment: Experiment) -> list[Path]:
    """Every file that a teacher has in ``folder``."""
    names = (_RESULT, *experiment.outputs, _FEATURES, answers_file(experiment))
    return [folder / name for name in names]


def teacher_folders(folder: Path) -> list[Path]:
    """Every folder that a teacher has in ``folder``: weights, unfinished answers, checkpoints."""
    return [folder / _MODEL, folder / ANSWERS_WORK, folder / _UNFINISHED]


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
    files = {name: result.files.get(name, "") for name in experiment.outputs} | result.files
    # States and answers can be computed again from the weights. The weights serve no other purpose
    # and may be missing, but those that are there must be the teacher's.
    files = {name: digest for name, digest in files.items() if not _is_extra(name)}
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
        if not experiment.settings.finetune_teacher:
            raise StudyError(
                f"{experiment.teacher_source} cannot be the teacher: {error}. Choose another."
            ) from error
        remedy = f"lower --teacher-learning-rate ({experiment.settings.teacher_learning_rate:g})"
        raise StudyError(f"The teacher diverged, {error}: {remedy}.") from error


def _train_teacher(
    experiment: Experiment, folder: Path, on_steps: Callable[[int], None]
) -> Teacher:
    chosen, tokenizer = experiment.settings, experiment.teacher_tokenizer
    rows = experiment.teacher_rows
    work, took = folder / _UNFINISHED, Fit(0, 0.0)
    model = experiment.load_teacher(experiment.teacher_source)
    # The result has the hashes of the files beside it, so it is removed first and written last.
    (folder / _RESULT).unlink(missing_ok=True)
    (folder / _FEATURES).unlink(missing_ok=True)
    claim(work, experiment.as_run(experiment.teacher_settings))
    if chosen.finetune_teacher:
        if chosen.freeze_embeddings:
            models.freeze_embeddings(model)
        schedule, collate = experiment.teacher_schedule(), experiment.collator(tokenizer)
        took = fit(model, rows.train, collate, schedule, work, on_steps=on_steps)
        save_model(folder / _MODEL, model, tokenizer)
    measured = experiment.store_outputs(model, folder, work, on_steps)
    weights = files_below(folder / _MODEL) if chosen.finetune_teacher else []
    files = file_digests(folder, [*(folder / name for name in experiment.outputs), *weights])
    result = Result(
        loss="teacher",
        seed=chosen.teacher_seed,
        settings=experiment.teacher_settings,
        teacher_metrics=measured["metrics"],
        agreement=1.0,
        teacher_logits=files[experiment.outputs[0]],
        files=files,
        **measured,
        **provenance(experiment, rows, took),
    )
    write_result(folder / _RESULT, result)
    remove(work)
    return _load_teacher(experiment, folder, result)


def _load_teacher(experiment: Experiment, folder: Path, result: Result) -> Teacher:
    """The teacher whose files have been compared with their hashes.

    Raises:
        ValueError: if they do not hold outputs for these rows.
    """
    outputs = experiment.load_outputs(folder)
    extras: dict[str, Any] = {}
    own = {
        "features": (_FEATURES, _load_features),
        "answers": (answers_file(experiment), load_answers),
    }
    for kind, (name, load) in own.items():
        if (folder / name).is_file() and name in result.files:
            extras[kind] = load(folder / name, result.files[name], len(experiment.data.train))
    return Teacher(result, outputs.train, outputs.dev, outputs.embedding, **extras)


def _load_features(path: Path, digest: str, rows: int) -> Tensor | None:
    """The stored states, or None if they are to be computed again."""
    try:
        if file_digest(path) != digest:
            raise ValueError(f"{path} is not the file that was written")
        features = load_tensors(path, "features")[0]["features"]
        check_stored(path, features, (rows, *features.shape[-1:]))
    except ValueError as error:
        notice(f"{error}; if a loss needs the teacher's states, they are computed again.")
        return None
    return features


def _is_weights(name: str) -> bool:
    return name.startswith(f"{_MODEL}/")


def _is_extra(name: str) -> bool:
    return name == _FEATURES or name.startswith("answers-")


def completed(
    experiment: Experiment, folder: Path, teacher: Teacher, runs: Sequence[Run], bar: Progress
) -> Teacher:
    """The teacher with the states and answers that ``runs`` need, which are stored in ``folder``.

    Raises:
        StudyError: if the weights that compute them are missing or not the teacher's.
    """
    if teacher.features is None and any(needs_features(run.options) for run in runs):
        teacher = _with_features(experiment, folder, teacher)
    if teacher.answers is None and any(needs_answers(run.objective.loss) for run in runs):
        bar.plan(answer_batches(experiment))
        teacher = _with_answers(experiment, folder, teacher, bar.start("answers of the teacher"))
    return teacher


def _with_features(experiment: Experiment, folder: Path, teacher: Teacher) -> Teacher:
    model = _model(experiment, folder, teacher, _FEATURES, "A loss compares states")
    assert isinstance(experiment, ClassificationExperiment)  # others refuse such losses
    try:
        states = experiment.states(model)
    except FloatingPointError as error:
        raise StudyError(f"A loss compares states, but {error}: leave it out.") from error
    half = states.half()
    save_tensors(folder / _FEATURES, {"features": half if half.isfinite().all() else states})
    return _listed(experiment, folder, teacher, _FEATURES)


def _with_answers(
    experiment: Experiment, folder: Path, teacher: Teacher, on_steps: Callable[[int], None]
) -> Teacher:
    name = answers_file(experiment)
    model = _model(experiment, folder, teacher, name, "A loss reads the teacher's answers")
    digest = teacher.result.teacher_logits
    generate_answers(experiment, model, folder, digest, on_steps)
    before = teacher.result.files.get(name)
    if before is not None and before != file_digest(folder / name):
        notice(
            f"{folder / name} was generated again and is not the file that it was before. Finished "
            "runs that were trained on the former answers are kept."
        )
    return _listed(experiment, folder, teacher, name)


def _model(
    experiment: Experiment, folder: Path, teacher: Teacher, name: str, purpose: str
) -> PreTrainedModel:
    """The teacher itself, to compute the file called ``name``."""
    files = teacher.result.files
    if name not in files and (folder / name).exists():
        notice(f"{folder / name} is not listed in {folder / _RESULT} and is computed again.")
    source = experiment.teacher_source
    if experiment.settings.finetune_teacher:
        source = str(folder / _MODEL)
        weights = {name: digest for name, digest in files.items() if _is_weights(name)}
        if not weights or changed_file(folder, weights) is not None:
            raise StudyError(
                f"{purpose}, and the weights of the teacher, which compute them, are not in "
                f"{folder}. Remove that folder to train teacher and students again, or leave such "
                "losses out."
            )
    return experiment.load_teacher(source)


def _listed(experiment: Experiment, folder: Path, teacher: Teacher, name: str) -> Teacher:
    """The teacher with a new file, whose hash is written to its result."""
    files = {**teacher.result.files, name: file_digest(folder / name)}
    result = dataclasses.replace(teacher.result, files=files)
    write_result(folder / _RESULT, result)
    return _load_teacher(experiment, folder, result)
