"""Runs spread over processes: one a GPU, or some cores each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from otkd.cli.console import CommandError, quiet_libraries
from otkd.cli.experiment import Experiment
from otkd.cli.progress import StepBar
from otkd.cli.results import Result
from otkd.cli.runs import Run, run_student
from otkd.cli.teachers import Teacher, find_teacher

# Small encoders gain little from a second core; more than a few processes want much memory.
_USUAL = 4


def worker_count(asked: int | None) -> int:
    """The number of processes to train in: as asked, else one a GPU, else one a core up to four.

    Raises:
        CommandError: if it is less than one, or more than there are cores or GPUs.
    """
    gpus = torch.cuda.device_count()
    most = gpus or os.cpu_count() or 1
    if asked is None:
        return gpus or min(most, _USUAL)
    if not 1 <= asked <= most:
        raise CommandError(
            f"--workers must lie between 1 and {most}, the number of "
            f"{'GPUs' if gpus else 'cores'} here; got {asked}."
        )
    return asked


def run_all(
    experiment: Experiment,
    teacher: Teacher,
    teacher_folder: Path,
    runs: Sequence[Run],
    workers: int,
    bar: StepBar,
) -> Iterator[tuple[Run, Result]]:
    """Distil every student; yields each as it is done.

    Args:
        experiment: what they share.
        teacher: of all of them.
        teacher_folder: where another process finds it.
        runs: in the order in which they are begun.
        workers: number of processes; 1 is this one.
        bar: shows their steps.
    """
    if not runs:
        return
    bar.plan(sum(run.steps(experiment) for run in runs))
    if workers == 1:
        for number, run in enumerate(runs, 1):
            on_steps = bar.start(f"{run} (run {number} of {len(runs)})")
            yield run, run_student(experiment, teacher, run, on_steps)
        return
    with _pool(experiment, teacher_folder, min(workers, len(runs))) as (pool, steps):
        pending: dict[Future[Result], Run] = {pool.submit(_run, run): run for run in runs}
        while pending:
            done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                yield pending.pop(future), future.result()
            finished = len(runs) - len(pending)
            bar.start(f"{finished} of {len(runs)} runs done")(_drain(steps))


def _drain(steps: Any) -> int:
    total = 0
    try:
        while True:
            total += steps.get_nowait()
    except Empty:
        return total


@contextmanager
def _pool(
    experiment: Experiment, teacher_folder: Path, workers: int
) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    # Not forked: neither CUDA nor the threads of a numeric library survive that.
    context = multiprocessing.get_context("spawn")
    numbers, steps = context.Queue(), context.Queue()
    for number in range(workers):
        numbers.put(number)
    shared = (experiment.settings, experiment.objectives, experiment.folder, experiment.tuning)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start,
        initargs=(shared, teacher_folder, workers, numbers, steps),
    )
    # Without this a signal would end this process alone.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield pool, steps
        pool.shutdown()
    finally:
        signal.signal(signal.SIGTERM, before)
        # After a mistake or Ctrl-C the others must not go on: what they do is kept in checkpoints.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


# What a worker process keeps between its runs.
_worker: tuple[Experiment, Teacher, Any] | None = None


def _start(shared: tuple, teacher_folder: Path, workers: int, numbers: Any, steps: Any) -> None:
    global _worker
    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    number = numbers.get()
    if torch.cuda.device_count() > 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else list(map(str, range(workers)))
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number]
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    quiet_libraries()
    experiment = Experiment(*shared)
    teacher = find_teacher(experiment, teacher_folder, overwrite=False)
    if teacher is None:
        raise RuntimeError(f"the teacher in {teacher_folder} changed while its students learned")
    _worker = experiment, teacher, steps


def _run(run: Run) -> Result:
    assert _worker is not None
    experiment, teacher, steps = _worker
    return run_student(experiment, teacher, run, steps.put)
