"""One student: trained, evaluated, and its result written where later commands find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otkd.files import changed_file, file_digests, files_below
from otkd.integrations.annealing import TemperatureAnnealing
from otkd.study.answers import answered
from otkd.study.messages import notice
from otkd.study.objectives import (
    annealed_terms,
    needs_answers,
    needs_features,
    objective_options,
)
from otkd.study.ownership import remove
from otkd.study.provenance import provenance
from otkd.study.results import DIVERGED, Result, write_result
from otkd.study.reuse import TEACHER, find_result
from otkd.study.training import DivergedError, Fit, fit
from otkd.study.work import check_work, claim, save_model
from otkd.tasks import get_metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otkd.study.experiment import Experiment
    from otkd.study.interface import Rows
    from otkd.study.protocols import Objective
    from otkd.study.teachers import Teacher


@dataclass(frozen=True)
class Run:
    """One student to be trained, and its files.

    Attributes:
        objective: the loss with its settings.
        seed: of classification head, dropout and data order.
        result: the result file.
        work: checkpoints while the run is unfinished.
        model: where to save the student, or None to keep only its result.
        tuning: whether it is a candidate of a tuning.
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
    def options(self) -> dict[str, Any]:
        """The options of its loss."""
        return objective_options(self.objective.loss, self.objective.settings)

    def settings(self, experiment: Experiment) -> dict[str, Any]:
        """Everything that its outcome depends on, by name."""
        return experiment.student_settings(self.objective, self.seed, tuning=self.tuning)

    def steps(self, experiment: Experiment) -> int:
        """Its steps of progress: those of the optimiser, and of the metrics at the end."""
        schedule = experiment.student_schedule(self.objective, self.seed)
        final = 0 if self.tuning else experiment.final_steps
        return schedule.steps(experiment.train_rows(tuning=self.tuning)) + final


def find_student(
    experiment: Experiment, teacher: Teacher | None, run: Run, *, overwrite: bool
) -> Result | None:
    """The result of a finished run, or None if the run is to be done.

    Args:
        experiment: of the run.
        teacher: of the student; None while it is not known.
        run: what to look for.
        overwrite: repeat a run with other settings, with another teacher, or that diverged.

    Raises:
        StudyError: if the result, or an unfinished run, is of other settings.
    """
    settings = experiment.as_run(run.settings(experiment))
    wanted = settings if teacher is None else {**settings, TEACHER: teacher.result.teacher_logits}
    result = find_result(run.result, wanted, loss=run.objective.name, overwrite=overwrite)
    if result is None:
        check_work(run.work, settings, overwrite=overwrite)
        return None
    reason = None
    if result.diverged:
        reason = f"{run.result} is of a run that diverged" if overwrite else None
    elif run.model is not None:
        if f"{run.model.name}/config.json" not in result.files:
            reason = f"{run.result} does not list the files of its student"
        elif changed := changed_file(run.result.parent, result.files):
            reason = f"{changed} is not the file that {run.result} was written with"
    if reason is not None:
        notice(f"{reason}; the run is done again.")
        return None
    return result


def run_student(
    experiment: Experiment, teacher: Teacher, run: Run, on_steps: Callable[[int], None]
) -> Result:
    """Train one student, evaluate it and write its result, also if the training diverged."""
    rows = experiment.tuning_rows if run.tuning else experiment.student_rows
    if needs_answers(run.objective.loss):
        assert teacher.answers is not None
        rows = answered(experiment, rows, teacher.answers)
    student = experiment.build_student(run.seed)
    outcome: dict[str, Any]
    try:
        took = _distil(experiment, teacher, run, rows, student, on_steps)
        headline = experiment.task.headline
        improvement = get_metric(headline).improvement
        best = max(took.evaluations, key=lambda each: improvement(each[1][headline]))
        last = took.evaluations[-1]
        _, metrics = best if run.objective.settings.score == "best" else last
        # An evaluation in a checkpoint of an earlier version has no agreement.
        outcome = {"agreement": metrics.get("agreement", last[1]["agreement"])}
        metrics = {name: value for name, value in metrics.items() if name != "agreement"}
        final = {} if run.tuning else experiment.final_metrics(student, on_steps)
        outcome["metrics"] = metrics | final
    except DivergedError as error:
        took = error.took
        outcome = {"metrics": {}, "agreement": None, "status": DIVERGED, "reason": error.reason}
    # The result has the hashes of the saved student, so it is removed first and written last.
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
        teacher_logits=teacher.result.teacher_logits,
        **outcome,
        **provenance(experiment, rows, took),
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
    name, options = run.objective.loss, run.options
    stored = None
    if not needs_answers(name):  # its outputs are those on the answers of the data
        stored = teacher.on(rows, features=needs_features(options))
    widths, states = None, getattr(stored, "features", None)
    if states is not None:
        widths = (student.config.hidden_size, states.shape[-1])
    try:
        loss = experiment.build_loss(name, options, teacher.embedding, widths)
    except ValueError as error:
        # The options were checked before; only this teacher's numbers are new.
        raise DivergedError(Fit(0, 0.0), f"the teacher does not suit the loss: {error}") from error
    callbacks = []
    if options.get("anneal"):
        callbacks += map(TemperatureAnnealing, annealed_terms(name, loss))
    settings = {
        **experiment.as_run(run.settings(experiment)),
        TEACHER: teacher.result.teacher_logits,
    }
    return fit(
        student,
        rows.train,
        experiment.collator(experiment.student_tokenizer),
        experiment.student_schedule(run.objective, run.seed),
        claim(run.work, settings),
        loss=loss,
        teacher=stored,
        options=experiment.trainer_options,
        callbacks=callbacks,
        evaluate=lambda model: experiment.score(model, rows, teacher),
        on_steps=on_steps,
    )
