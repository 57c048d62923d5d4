"""Studies: which runs there are, which of them are done, and the order of the others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from otkd.files import sentence, write_json
from otkd.study.experiment import Experiment
from otkd.study.kinds import make_experiment
from otkd.study.messages import StudyError, notice
from otkd.study.objectives import check_effect
from otkd.study.ownership import held, remove
from otkd.study.plan import best_candidate, candidates, claim_of, runs_of
from otkd.study.protocols import Objective, Protocol
from otkd.study.report import save_plot
from otkd.study.results import Result
from otkd.study.runs import Run, find_student
from otkd.study.settings import Seed, Seeds, Settings
from otkd.study.summary import summary_json
from otkd.study.teachers import (
    Teacher,
    completed,
    find_teacher,
    teacher_folders,
    train_teacher,
)
from otkd.study.validation import checked
from otkd.study.workers import Progress, Runner, worker_count
from otkd.tasks import get_task

Shown = Callable[[], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Comparison:
    """The results of one task, with their folder."""

    folder: Path
    teacher: Result
    students: list[Result]


def compare(
    settings: Settings,
    losses: Sequence[str],
    seeds: int | None,
    output_dir: Path,
    *,
    progress: Shown,
    protocol: Protocol | None = None,
    given: Collection[str] = (),
    workers: int | None = None,
    overwrite: bool = False,
) -> Generator[Comparison, None, None]:
    """Train one student per task, loss and seed; finished runs are kept and not repeated.

    Every task is yielded when its summary and plot have been written.

    Args:
        settings: of the command line; ``task`` may name several, separated by commas.
        losses: names of losses; none stands for all of the protocol.
        seeds: students per loss; None for the protocol's number, or 5.
        output_dir: of the results; a protocol has a folder of its own in it.
        progress: shows the steps of a task.
        protocol: fixes settings, losses and tuning.
        given: the settings that the user gave, which take precedence over the protocol's.
        workers: number of processes.
        overwrite: repeat runs with other settings, with another teacher, or that diverged.

    Raises:
        StudyError: for invalid options, before anything is trained.
        DataError: for rows that cannot be read.
    """
    if seeds is None:
        seeds = protocol.seeds if protocol else 5
    checked(Seeds, seeds, "--seeds")
    workers = worker_count(workers)
    check_writable(output_dir)
    root = output_dir / protocol.name if protocol else output_dir
    tuning = protocol.tuning.without(given) if protocol and protocol.tuning else None
    experiments = []
    for task in dict.fromkeys(get_task(name).name for name in settings.task.split(",")):
        own = _of_task(settings, task, given)
        if protocol is None:
            objectives = [Objective(name, name, own) for name in dict.fromkeys(losses)]
        else:
            own = protocol.resolve(own, given)
            objectives = protocol.objectives(own, given, dict.fromkeys(losses))
        experiments.append(make_experiment(own, objectives, root / task, tuning))
        check_effect(given, objectives)
    with ExitStack() as stack:
        for each in experiments:
            runs = [*candidates(each), *runs_of(each.folder, each.objectives, seeds)]
            stack.enter_context(held(claim_of(each, runs, "summary.json", "comparison.png")))
        for each in experiments:
            with progress() as bar:
                done = _compare_task(each, seeds, workers, bar, overwrite=overwrite)
            write_json(done.folder / "summary.json", summary_json(done.teacher, done.students))
            save_plot(done.folder / "comparison.png", done.teacher, done.students)
            yield done


def _compare_task(
    experiment: Experiment, seeds: int, workers: int, bar: Progress, *, overwrite: bool
) -> Comparison:
    """One task: the teacher, the tuning of losses that have candidates, the students."""
    folder, tried = experiment.folder, candidates(experiment)
    runs = runs_of(folder, experiment.objectives, seeds) if not tried else []
    teacher, done = _prepare(experiment, [*tried, *runs], bar, overwrite=overwrite)
    with Runner(experiment, workers, bar) as runner:
        done |= _do(experiment, teacher, tried, done, runner, bar)
        if tried:
            chosen = [best_candidate(objective, done) for objective in experiment.objectives]
            runs = runs_of(folder, chosen, seeds)
            done |= _find(experiment, teacher, runs, overwrite=overwrite)
        done |= _do(experiment, teacher, runs, done, runner, bar)
    return Comparison(folder, teacher.result, [done[run] for run in runs])


def train(
    settings: Settings,
    loss: str,
    seed: int,
    output_dir: Path,
    *,
    progress: Shown,
    given: Collection[str] = (),
    overwrite: bool = False,
) -> Comparison:
    """Train one student and save it beside its result; arguments as in :func:`compare`.

    Raises:
        StudyError: for invalid options, before anything is trained, or if the student diverges.
        DataError: for rows that cannot be read.
    """
    checked(Seed, seed, "--seed")
    check_writable(output_dir)
    settings = _of_task(settings, settings.task, given)
    objective = Objective(loss, loss, settings)
    experiment = make_experiment(settings, [objective], output_dir)
    check_effect(given, [objective])
    result, model = output_dir / "results.json", output_dir / "student"
    run = Run(objective, seed, result, output_dir / "student.work", model)
    with held(claim_of(experiment, [run])), progress() as bar:
        teacher, done = _prepare(experiment, [run], bar, overwrite=overwrite)
        runner = Runner(experiment, 1, bar)
        done |= _do(experiment, teacher, [run], done, runner, bar)
    if done[run].diverged:
        raise StudyError(
            f"The student {_outcome(done[run])}. It is not saved; {run.result} says so. Change "
            "settings, such as a lower --learning-rate, or repeat it with --overwrite."
        )
    return Comparison(output_dir, teacher.result, [done[run]])


def _of_task(settings: Settings, task: str, given: Collection[str]) -> Settings:
    """The settings of a task, whose defaults replace those that the user did not give."""
    defaults = get_task(task).defaults
    own = {name: value for name, value in defaults.items() if name not in given}
    return dataclasses.replace(settings, **{**own, "task": task})


def check_writable(folder: Path) -> None:
    """Check that files can be written to ``folder``, which is made if necessary.

    Raises:
        StudyError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StudyError(
            f"--output-dir {folder} cannot be written to. {sentence(error)}"
        ) from error


def _prepare(
    experiment: Experiment, runs: Sequence[Run], bar: Progress, *, overwrite: bool
) -> tuple[Teacher, dict[Run, Result]]:
    """The teacher and the finished runs; everything is compared before the first training."""
    folder = experiment.folder / "teacher"
    teacher = find_teacher(experiment, folder, overwrite=overwrite)
    done = _find(experiment, teacher, runs, overwrite=overwrite)
    if teacher is None:
        if done:
            notice(
                f"The teacher of {len(done)} finished runs is missing and is trained again. If its "
                "outputs differ, these runs "
                f"{'are done again' if overwrite else 'need --overwrite to be done again'}."
            )
        bar.plan(experiment.output_steps)
        if experiment.settings.finetune_teacher:
            bar.plan(experiment.teacher_schedule().steps(experiment.train_rows()))
        teacher = train_teacher(experiment, folder, bar.start("teacher"))
        done = _find(experiment, teacher, runs, overwrite=overwrite)
    remove(teacher_folders(folder)[-1])  # the work of a command that was killed
    return teacher, done


def _find(
    experiment: Experiment, teacher: Teacher | None, runs: Sequence[Run], *, overwrite: bool
) -> dict[Run, Result]:
    """The results of finished runs; those of another teacher are refused."""
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
    runner: Runner,
    bar: Progress,
) -> dict[Run, Result]:
    pending = [run for run in runs if run not in done]
    teacher = completed(experiment, experiment.folder / "teacher", teacher, pending, bar)
    start = time.monotonic()
    finished: dict[Run, Result] = {}
    for run, result in runner.run(teacher, pending):
        finished[run] = result
        text = f"{experiment.task.name}: {run}: {_outcome(result)}"
        if result.diverged:
            notice(text)
            continue
        minutes = (time.monotonic() - start) / 60
        left = minutes / len(finished) * (len(pending) - len(finished))
        bar.finished(f"{text} ({len(finished)} of {len(pending)}, about {left:.0f} min left)")
    return finished


def _outcome(result: Result) -> str:
    if result.diverged:
        return f"diverged after {result.steps} steps: {result.reason}"
    return f"{result.headline} {result.score:.4f}"
