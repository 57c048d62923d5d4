"""The commands `train` and `compare`: which runs there are, in which order, with what around."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from otkd.cli.console import CommandError, notice, out, quiet_libraries
from otkd.cli.experiment import Experiment
from otkd.cli.progress import StepBar
from otkd.cli.report import comparison_table, explanation, save_plot
from otkd.cli.results import Result, write_json
from otkd.cli.runs import RunPaths, find_student, find_teacher, run_student, train_teacher
from otkd.cli.stats import summary_json
from otkd.data import get_task

if TYPE_CHECKING:
    from otkd.cli.settings import Settings


def compare(
    settings: Settings, losses: list[str], seeds: int, output_dir: Path, *, overwrite: bool
) -> None:
    """Distil one student per loss and seed; finished runs are kept and not done again.

    Raises:
        CommandError: for options that cannot be meant, before anything is trained.
        DataError: for rows that cannot be read.
    """
    quiet_libraries()
    if seeds < 1:
        raise CommandError(f"--seeds must be at least 1, got {seeds}.")
    check_writable(output_dir)
    folder = output_dir / get_task(settings.task).name
    losses = list(dict.fromkeys(losses))
    experiment = Experiment(settings, losses, folder)
    # Seeds outside, losses inside: a comparison cut short has all losses on its first seeds.
    runs = {
        (loss, seed): RunPaths(
            folder / loss / f"seed-{seed}.json", folder / loss / f"seed-{seed}.partial"
        )
        for seed in range(seeds)
        for loss in losses
    }
    teacher, results = _run_all(experiment, folder / "teacher", runs, overwrite=overwrite)
    write_json(folder / "summary.json", summary_json(teacher, results))
    save_plot(folder / "comparison.png", teacher, results)
    _print_report(teacher, results)
    notice(f"Results, summary.json and comparison.png are in {folder}.")


def train(settings: Settings, loss: str, seed: int, output_dir: Path, *, overwrite: bool) -> None:
    """Distil one student and save it beside its result.

    Raises:
        CommandError: for options that cannot be meant, before anything is trained.
        DataError: for rows that cannot be read.
    """
    quiet_libraries()
    if seed < 0:
        raise CommandError(f"--seed must not be negative, got {seed}.")
    check_writable(output_dir)
    experiment = Experiment(settings, [loss], output_dir)
    paths = RunPaths(
        output_dir / "results.json", output_dir / "student.work", output_dir / "student"
    )
    teacher, results = _run_all(
        experiment, output_dir / "teacher", {(loss, seed): paths}, overwrite=overwrite
    )
    _print_report(teacher, results)
    notice(f"The student is in {paths.model}, its result in {paths.result}.")


def _print_report(teacher: Result, results: list[Result]) -> None:
    out.print(comparison_table(teacher, results))
    out.print(explanation(teacher, results), highlight=False)


def check_writable(folder: Path) -> None:
    """Check that files can be written to ``folder``, which is made if need be.

    Raises:
        CommandError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(
            f"--output-dir {folder} cannot be written to: {error.strerror or error}."
        ) from error


def _run_all(
    experiment: Experiment,
    teacher_folder: Path,
    runs: dict[tuple[str, int], RunPaths],
    *,
    overwrite: bool,
) -> tuple[Result, list[Result]]:
    """Do the runs that are not done, the teacher first; every mismatch shows before the first."""
    teacher = find_teacher(experiment, teacher_folder, overwrite=overwrite)
    results: dict[tuple[str, int], Result] = {}
    for (loss, seed), paths in runs.items():
        found = find_student(experiment, paths, loss, seed, overwrite=overwrite)
        if found is not None:
            results[loss, seed] = found
    rows = len(experiment.data.train)
    with StepBar() as bar:
        if teacher is None:
            if experiment.settings.finetune_teacher:
                bar.plan(experiment.schedule(teacher=True, seed=0).steps(rows))
            teacher = train_teacher(experiment, teacher_folder, bar.start("teacher"))
        others = [key for key, found in results.items() if found.teacher_logits != teacher.digest]
        for key in others:
            del results[key]
        if others:
            notice(f"Finished runs that had another teacher, done again: {len(others)}.")
        if results:
            notice(f"Finished runs that are kept: {len(results)} of {len(runs)}.")
        pending = {key: paths for key, paths in runs.items() if key not in results}
        if pending:
            bar.plan(len(pending) * experiment.schedule(teacher=False, seed=0).steps(rows))
        for number, ((loss, seed), paths) in enumerate(pending.items(), 1):
            on_steps = bar.start(f"{loss}, seed {seed} (run {number} of {len(pending)})")
            results[loss, seed] = run_student(experiment, teacher, paths, loss, seed, on_steps)
    return teacher.result, [results[key] for key in runs]
