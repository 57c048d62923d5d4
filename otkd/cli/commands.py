"""The commands `train` and `compare`: which runs there are, in which order, with what around."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from otkd.cli.console import err, notice, out
from otkd.cli.progress import StepBar
from otkd.study.experiment import Experiment
from otkd.study.failures import sentence
from otkd.study.messages import StudyError, quiet_libraries
from otkd.study.objectives import check_effect
from otkd.study.ownership import Claim, held, remove
from otkd.study.precision import PRECISION_FILE
from otkd.study.protocols import Objective, Protocol
from otkd.study.report import comparison_table, explanation, save_plot
from otkd.study.results import Result, write_json
from otkd.study.runs import Run, find_student
from otkd.study.settings import Settings, check_range
from otkd.study.stats import summary_json
from otkd.study.teachers import (
    Teacher,
    find_teacher,
    teacher_files,
    teacher_folders,
    train_teacher,
    unfinished,
    with_features,
)
from otkd.study.workers import run_all, worker_count
from otkd.tasks import get_task


def compare(
    settings: Settings,
    losses: Sequence[str],
    seeds: int | None,
    output_dir: Path,
    *,
    protocol: Protocol | None = None,
    given: Collection[str] = (),
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Distil one student per loss and seed; finished runs are kept and not done again.

    Args:
        settings: of the command line; ``task`` may name several, with commas between them.
        losses: names of losses; none stands for all of the protocol.
        seeds: students per loss; None for the protocol's number, or 5.
        output_dir: where results go, under the protocol's name if there is one.
        protocol: fixes settings, losses and tuning.
        given: the settings that the user gave and the protocol does not replace.
        workers: processes to train in.
        overwrite: redo runs that were made with other settings or another teacher.

    Raises:
        StudyError: for options that cannot be meant, before anything is trained.
        DataError: for rows that cannot be read.
    """
    quiet_libraries()
    if seeds is None:
        seeds = protocol.seeds if protocol else 5
    check_range("seeds", seeds)
    count = worker_count(workers)
    check_writable(output_dir)
    root = output_dir / protocol.name if protocol else output_dir
    losses = list(dict.fromkeys(losses))
    tasks = [get_task(name).name for name in settings.task.split(",")]
    tuning = protocol.tuning.without(given) if protocol and protocol.tuning else None
    experiments = []
    for task in dict.fromkeys(tasks):
        own = dataclasses.replace(settings, task=task)
        if protocol is None:
            objectives = [Objective(name, name, own) for name in losses]
        else:
            own = protocol.resolve(own, given)
            objectives = protocol.objectives(own, given, losses)
        experiments.append(Experiment(own, objectives, root / task, tuning))
        check_effect(given, objectives)
    with ExitStack() as stack:
        for experiment in experiments:
            folder, objectives = experiment.folder, experiment.objectives
            runs = [*_candidates(experiment), *_runs(folder, objectives, seeds)]
            stack.enter_context(held(_claim(experiment, runs, "summary.json", "comparison.png")))
        for experiment in experiments:
            teacher, results = _compare_one(experiment, seeds, count, overwrite=overwrite)
            folder = experiment.folder
            write_json(folder / "summary.json", summary_json(teacher, results))
            save_plot(folder / "comparison.png", teacher, results)
            _print_report(teacher, results)
            notice(f"Results, summary.json and comparison.png are in {folder}.")


def _claim(experiment: Experiment, runs: Sequence[Run], *names: str) -> Claim:
    """Everything that a command writes in the folder of an experiment, and what it reads."""
    chosen, folder = experiment.settings, experiment.folder
    models = {"--teacher": chosen.teacher, "--student": chosen.student}
    return Claim(
        folder,
        files=[
            *(folder / name for name in (PRECISION_FILE, *names)),
            *teacher_files(folder / "teacher"),
            *(run.result for run in runs),
        ],
        folders=[
            *teacher_folders(folder / "teacher"),
            *(run.work for run in runs),
            *(run.model for run in runs if run.model is not None),
        ],
        models={name: Path(model) for name, model in models.items() if model is not None},
        data={} if chosen.data_dir is None else {"--data-dir": chosen.data_dir},
    )


def _compare_one(
    experiment: Experiment, seeds: int, workers: int, *, overwrite: bool
) -> tuple[Result, list[Result]]:
    """One task: the teacher, the tuning of losses that have candidates, the students."""
    folder, candidates = experiment.folder, _candidates(experiment)
    with StepBar() as bar:
        runs = _runs(folder, experiment.objectives, seeds) if not candidates else []
        teacher, done = _prepare(experiment, [*candidates, *runs], bar, overwrite=overwrite)
        done |= _do(experiment, teacher, candidates, done, workers, bar)
        if candidates:
            chosen = [best_candidate(objective, done) for objective in experiment.objectives]
            runs = _runs(folder, chosen, seeds)
            done |= _find(experiment, teacher, runs, overwrite=overwrite)
        done |= _do(experiment, teacher, runs, done, workers, bar)
    return teacher.result, [done[run] for run in runs]


def train(
    settings: Settings,
    loss: str,
    seed: int,
    output_dir: Path,
    *,
    given: Collection[str] = (),
    overwrite: bool = False,
) -> None:
    """Distil one student and save it beside its result; arguments as of :func:`compare`.

    Raises:
        StudyError: for options that cannot be meant, before anything is trained.
        DataError: for rows that cannot be read.
    """
    quiet_libraries()
    check_range("seed", seed)
    check_writable(output_dir)
    objective = Objective(loss, loss, settings)
    experiment = Experiment(settings, [objective], output_dir)
    check_effect(given, [objective])
    run = Run(
        objective,
        seed,
        output_dir / "results.json",
        output_dir / "student.work",
        output_dir / "student",
    )
    with held(_claim(experiment, [run])), StepBar() as bar:
        teacher, done = _prepare(experiment, [run], bar, overwrite=overwrite)
        done |= _do(experiment, teacher, [run], done, 1, bar)
    if done[run].diverged:
        raise StudyError(
            f"The student {_outcome(done[run])}. It is not saved; {run.result} says so. Change "
            "settings, such as a lower --learning-rate, or do it again with --overwrite."
        )
    _print_report(teacher.result, [done[run]])
    notice(f"The student is in {run.model}, its result in {run.result}.")


def _print_report(teacher: Result, results: list[Result]) -> None:
    out.print(comparison_table(teacher, results))
    out.print(explanation(teacher, results), highlight=False)


def check_writable(folder: Path) -> None:
    """Check that files can be written to ``folder``, which is made if need be.

    Raises:
        StudyError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StudyError(
            f"--output-dir {folder} cannot be written to. {sentence(error)}"
        ) from error


def _candidates(experiment: Experiment) -> list[Run]:
    return [
        _run(experiment.folder / objective.name / "tuning", candidate, 0, number)
        for objective in experiment.objectives
        if objective.candidates and experiment.tuning is not None
        for number, candidate in enumerate(objective.tried(**experiment.tuning.settings))
    ]


def _runs(folder: Path, objectives: Sequence[Objective], seeds: int) -> list[Run]:
    # Seeds outside, losses inside: a comparison cut short has all losses on its first seeds.
    return [
        _run(folder / objective.name, objective, seed)
        for seed in range(seeds)
        for objective in objectives
    ]


def _run(folder: Path, objective: Objective, seed: int, candidate: int | None = None) -> Run:
    name = seed if candidate is None else candidate
    return Run(
        objective,
        seed,
        folder / f"{name}.json",
        folder / f"{name}.partial",
        tuning=candidate is not None,
    )


def best_candidate(objective: Objective, done: dict[Run, Result]) -> Objective:
    """The objective with the best of its candidates; the first of equals.

    One that diverged is worse than any other.
    """
    if not objective.candidates:
        return objective
    tried = {
        run.result.stem: result
        for run, result in done.items()
        if run.tuning and run.objective.name == objective.name
    }
    scores = {
        number: -math.inf if tried[number].diverged else tried[number].score
        for number in sorted(tried, key=int)
    }
    best = max(scores, key=lambda number: scores[number])
    if tried[best].diverged:
        notice(
            f"All {len(tried)} candidates of {objective.name} diverged; its students are trained "
            "with the first."
        )
    return objective.tried()[int(best)]


def _prepare(
    experiment: Experiment, runs: Sequence[Run], bar: StepBar, *, overwrite: bool
) -> tuple[Teacher, dict[Run, Result]]:
    """The teacher and the runs that are done; every mismatch shows before the first training."""
    folder = experiment.folder / "teacher"
    teacher = find_teacher(experiment, folder, overwrite=overwrite)
    done = _find(experiment, teacher, runs, overwrite=overwrite)
    if teacher is None:
        if done:
            notice(
                f"The teacher of {len(done)} finished runs is not there and is trained again. "
                "Should another come of it, these runs are "
                f"{'done again' if overwrite else 'not kept: they need --overwrite'}."
            )
        if experiment.settings.finetune_teacher:
            bar.plan(experiment.teacher_schedule().steps(experiment.train_rows()))
        teacher = train_teacher(experiment, folder, bar.start("teacher"))
        done = _find(experiment, teacher, runs, overwrite=overwrite)
    remove(unfinished(folder))
    return teacher, done


def _find(
    experiment: Experiment, teacher: Teacher | None, runs: Sequence[Run], *, overwrite: bool
) -> dict[Run, Result]:
    """The outcomes of the runs that are done; those of another teacher are refused."""
    found: dict[Run, Result] = {}
    for run in runs:
        result = find_student(experiment, teacher, run, overwrite=overwrite)
        if result is not None:
            found[run] = result
            if teacher is not None:
                remove(run.work)  # left by a command that was killed between the two
    if found and teacher is not None:
        notice(f"Finished runs that are kept: {len(found)} of {len(runs)}.")
    return found


def _do(
    experiment: Experiment,
    teacher: Teacher,
    runs: Sequence[Run],
    done: dict[Run, Result],
    workers: int,
    bar: StepBar,
) -> dict[Run, Result]:
    pending = [run for run in runs if run not in done]
    folder = experiment.folder / "teacher"
    if any(run.needs_features for run in pending):
        teacher = with_features(experiment, folder, teacher)
    start = time.monotonic()
    finished: dict[Run, Result] = {}
    # Closed at once if it is left early, so that no process goes on without this one.
    with closing(run_all(experiment, teacher, folder, pending, workers, bar)) as outcomes:
        for run, result in outcomes:
            finished[run] = result
            if result.diverged:
                notice(f"{experiment.task.name}: {run}: {_outcome(result)}")
            elif not err.is_terminal:
                # A log has no bar to look at.
                minutes = (time.monotonic() - start) / 60
                left = minutes / len(finished) * (len(pending) - len(finished))
                notice(
                    f"{experiment.task.name}: {run}: {_outcome(result)} "
                    f"({len(finished)} of {len(pending)}, about {left:.0f} min left)"
                )
    return finished


def _outcome(result: Result) -> str:
    if result.diverged:
        return f"diverged after {result.steps} steps: {result.reason}"
    return f"{result.headline} {result.score:.4f}"
