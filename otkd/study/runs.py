"""One student: distilled, evaluated, and its result kept where the next command finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from otkd.integrations.annealing import TemperatureAnnealing
from otkd.study.fields import DIVERGED
from otkd.study.messages import notice
from otkd.study.objectives import (
    annealed_term,
    build_objective,
    needs_features,
    objective_options,
)
from otkd.study.ownership import remove
from otkd.study.results import (
    TEACHER,
    Result,
    changed_file,
    file_digests,
    files_below,
    find_result,
    write_result,
)
from otkd.study.teachers import Teacher
from otkd.study.traces import check_work, claim, common_fields, save_model
from otkd.study.training import DivergedError, Fit, fit
from otkd.tasks import agreement, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otkd.study.experiment import Experiment, Rows
    from otkd.study.protocols import Objective


@dataclass(frozen=True)
class Run:
    """One student to be distilled, and where it leaves its traces.

    Attributes:
        objective: the loss with its settings.
        seed: of head, dropout and data order.
        result: the result file.
        work: checkpoints while it is under way; removed when it is done.
        model: where to save the student, or None to keep the numbers alone.
        tuning: whether it is one candidate of a tuning.
    """

    objective: Objective
    seed: int
    result: Path
    work: Path
    model: Path | None = None
    tuning: bool = False

    def __str__(self) -> str:
        what = f"candidate {self.result.stem}" if self.tuning else f"seed {self.seed}"
        return f"{self.objective.name}, {what}"

    @property
    def needs_features(self) -> bool:
        """Whether its loss compares the states of student and teacher."""
        return needs_features(objective_options(self.objective.loss, self.objective.settings))

    def settings(self, experiment: Experiment) -> dict[str, Any]:
        """Everything its outcome depends on, by name."""
        return experiment.student_settings(self.objective, self.seed, tuning=self.tuning)

    def steps(self, experiment: Experiment) -> int:
        """Its optimiser steps."""
        schedule = experiment.student_schedule(self.objective, self.seed)
        return schedule.steps(experiment.train_rows(tuning=self.tuning))


def find_student(
    experiment: Experiment, teacher: Teacher | None, run: Run, *, overwrite: bool
) -> Result | None:
    """The outcome of a run that is finished, or None if it is to be done.

    Args:
        experiment: what it shares with others.
        teacher: whose students count; None while it is not known.
        run: what to look for.
        overwrite: whether a run with other settings, or of another teacher, is to be done again.

    Raises:
        StudyError: if it has other settings or another teacher, or a run begun and not finished
            has other settings.
    """
    settings = experiment.as_run(run.settings(experiment))
    wanted = settings if teacher is None else {**settings, TEACHER: teacher.digest}
    result = find_result(
        run.result,
        wanted,
        loss=run.objective.name,
        overwrite=overwrite,
        notice=notice,
    )
    if result is None:
        check_work(run.work, settings, overwrite=overwrite)
    elif result.diverged and overwrite:
        notice(f"{run.result} is of a run that diverged; it is done again.")
        return None
    elif run.model is not None and not result.diverged:
        return _with_model(run.result, run.model, result)
    return result


def _with_model(path: Path, model: Path, result: Result) -> Result | None:
    """The result, or None if the student saved in ``model`` does not belong to it."""
    if f"{model.name}/config.json" not in result.files:
        notice(f"{path} does not say which student it is of; the run is done again.")
        return None
    changed = changed_file(path.parent, result.files)
    if changed is not None:
        notice(f"{changed} is not the file that {path} was written with; the run is done again.")
        return None
    return result


def run_student(
    experiment: Experiment, teacher: Teacher, run: Run, on_steps: Callable[[int], None]
) -> Result:
    """Distil one student, evaluate it and write its result, also if the training diverged."""
    rows = experiment.tuning_rows if run.tuning else experiment.student_rows
    student = experiment.build_student(run.seed)
    outcome: dict[str, Any]
    try:
        took = _distil(experiment, teacher, run, rows, student, on_steps)
        score_by = run.objective.settings.score
        headline = experiment.task.headline
        best = max(took.evaluations, key=lambda evaluation: evaluation[1][headline])
        predicted = torch.cat(list(rows.predict(student).values()))
        outcome = {
            "metrics": (best if score_by == "best" else took.evaluations[-1])[1],
            "agreement": agreement(predicted, teacher.on_dev(rows)),
        }
    except DivergedError as error:
        took = error.took
        outcome = {"metrics": {}, "agreement": None, "status": DIVERGED, "reason": error.reason}
    # The result vouches for the student beside it, so it goes first and comes back last.
    run.result.unlink(missing_ok=True)
    if run.model is not None:
        if outcome["metrics"]:
            save_model(run.model, student, experiment.student_tokenizer)
            outcome["files"] = file_digests(run.result.parent, files_below(run.model))
        else:
            remove(run.model)
    result = Result(
        loss=run.objective.name,
        seed=run.seed,
        settings=run.settings(experiment),
        teacher_metrics=teacher.result.metrics,
        teacher_logits=teacher.digest,
        **outcome,
        **common_fields(experiment, rows, took),
    )
    write_result(run.result, result)
    remove(run.work)
    return result


def _distil(
    experiment: Experiment,
    teacher: Teacher,
    run: Run,
    rows: Rows,
    student: PreTrainedModel,
    on_steps: Callable[[int], None],
) -> Fit:
    loss = run.objective.loss
    options = objective_options(loss, run.objective.settings)
    signal = teacher.on(rows, features=run.needs_features)
    widths = None
    if signal.features is not None:
        widths = (student.config.hidden_size, signal.features.shape[-1])
    try:
        objective = build_objective(loss, options, teacher.class_rows, widths)
    except ValueError as error:
        # The options were tried before; what is new are the numbers of this teacher.
        raise DivergedError(Fit(0, 0.0), f"the teacher does not suit the loss: {error}") from error
    callbacks = []
    if options.get("anneal"):
        callbacks.append(TemperatureAnnealing(annealed_term(loss, objective)))
    return fit(
        student,
        rows.train,
        experiment.student_tokenizer,
        experiment.student_schedule(run.objective, run.seed),
        claim(run.work, {**experiment.as_run(run.settings(experiment)), TEACHER: teacher.digest}),
        loss=objective,
        teacher=signal,
        callbacks=callbacks,
        evaluate=lambda model: score(experiment.task, rows.predict(model), rows.labels),
        on_steps=on_steps,
    )
