"""Runs distributed over processes: one per GPU, or several that share the cores."""

from __future__ import annotations

import ctypes
import logging
import logging.handlers
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from queue import Empty
from typing import Any, Protocol

import torch
from typing_extensions import Self

from otkd.study.experiment import Experiment
from otkd.study.kinds import make_experiment
from otkd.study.messages import StudyError, quiet_libraries
from otkd.study.results import Result
from otkd.study.runs import Run, run_student
from otkd.study.teachers import Teacher, find_teacher

# Small encoders gain little from a second core, and every process needs memory.
_USUAL = 4
_PATIENCE = 10.0
_PR_SET_PDEATHSIG = 1  # of prctl(2)


class Progress(Protocol):
    """Shows the progress of a study."""

    def plan(self, steps: int) -> None:
        """Add steps to the total."""

    def start(self, description: str) -> Callable[[int], None]:
        """Name what is under way; the function that is returned counts its steps."""
        ...

    def finished(self, text: str) -> None:
        """Report a finished run."""


def worker_count(requested: int | None) -> int:
    """The number of processes: as requested, or one per GPU, or one per core up to four.

    Raises:
        StudyError: if it is less than one, or more than there are cores or GPUs.
    """
    gpus = torch.cuda.device_count()
    most = gpus or os.cpu_count() or 1
    if requested is None:
        return gpus or min(most, _USUAL)
    if not 1 <= requested <= most:
        raise StudyError(
            f"--workers must lie between 1 and {most}, the number of "
            f"{'GPUs' if gpus else 'cores'} of this machine; got {requested}."
        )
    return requested


class Runner:
    """Trains the students of an experiment, in this process or in several others.

    The processes start when they are first needed, since each takes seconds to import its
    libraries, and end with the context.
    """

    def __init__(self, experiment: Experiment, workers: int, bar: Progress):
        self._experiment, self._workers, self._bar = experiment, workers, bar
        self._stack = ExitStack()
        self._pool: tuple[ProcessPoolExecutor, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def run(self, teacher: Teacher, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
        """Train every student; yields each as it is done."""
        self._bar.plan(sum(run.steps(self._experiment) for run in runs))
        if runs and self._workers > 1:
            yield from self._run_in_pool(runs)
            return
        for number, run in enumerate(runs, 1):
            on_steps = self._bar.start(f"{run} (run {number} of {len(runs)})")
            yield run, run_student(self._experiment, teacher, run, on_steps)

    def _run_in_pool(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
        if self._pool is None:
            self._pool = self._stack.enter_context(_pool(self._experiment, self._workers))
        pool, steps = self._pool
        with _undisturbed_start():
            pending: dict[Future[Result], Run] = {pool.submit(_run, run): run for run in runs}
        processes = multiprocessing.active_children()
        while pending:
            done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise StudyError(_how_it_ended(processes)) from error
                yield pending.pop(future), result
            finished = len(runs) - len(pending)
            self._bar.start(f"{finished} of {len(runs)} runs done")(_drain(steps))


def _drain(steps: Any) -> int:
    total = 0
    with suppress(Empty):
        while True:
            total += steps.get_nowait()
    return total


@contextmanager
def _pool(experiment: Experiment, workers: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    # Not forked: neither CUDA nor the threads of a numeric library survive that.
    context = multiprocessing.get_context("spawn")
    numbers, steps, notices = context.Queue(), context.Queue(), context.Queue()
    for number in range(workers):
        numbers.put(number)
    shared = (experiment.settings, experiment.objectives, experiment.folder, experiment.tuning)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start,
        initargs=(shared, workers, numbers, steps, notices),
    )
    # What the workers log is shown by this process, which has the progress bar.
    listener = logging.handlers.QueueListener(notices, *logging.getLogger("otkd").handlers)
    listener.start()
    try:
        yield pool, steps
        pool.shutdown()
    finally:
        # After an error or Ctrl-C the others must stop: their work is kept in checkpoints.
        pool.shutdown(wait=False, cancel_futures=True)
        children = multiprocessing.active_children()
        for process in children:
            process.terminate()
        # The folder is free for another command as soon as this one has ended.
        for process in children:
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
        listener.stop()


def _how_it_ended(processes: Sequence[BaseProcess]) -> str:
    """A message about a worker process that ended before its run."""
    for process in processes:
        process.join(_PATIENCE)
    codes = [process.exitcode for process in processes if process.exitcode]
    # The other workers were terminated because of the first.
    code = next((code for code in codes if code != -signal.SIGTERM), codes[0] if codes else None)
    how = "ended" if code is None else f"ended with exit status {code}"
    if code is not None and code < 0:
        how = f"was killed ({signal.Signals(-code).name})"
    return (
        f"A worker process {how} before its run was finished; the most frequent cause is too "
        "little memory. Finished runs are kept: run the command again with fewer --workers or a "
        "smaller --batch-size."
    )


@contextmanager
def _undisturbed_start() -> Iterator[None]:
    """Start processes completely, and so that Ctrl-C in a terminal does not reach them.

    A process whose parent is interrupted while it hands over the work would end with a traceback.
    Therefore signals to this process wait for the end of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals interrupt the main thread only
        return
    received: list[int] = []
    # Those that this process handles; an ignored signal, as under nohup, stays ignored.
    handled = [number for number in signal.valid_signals() if callable(signal.getsignal(number))]
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in handled
    }
    # Children inherit the mask, and not the handlers: their parent ends them with SIGTERM.
    masked = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masked else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


def _end_with_parent() -> None:
    """End this process as soon as its parent ends, also if the parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Works on every system, but not while a library holds the interpreter lock.
    threading.Thread(target=_outlive, args=(parent,), daemon=True).start()
    # The parent may have ended before the request to the system.
    if os.name == "posix" and os.getppid() != parent.pid:
        os._exit(1)


def _outlive(parent: BaseProcess) -> None:
    wait_for_any([parent.sentinel])
    os._exit(1)


# What a worker process keeps between its runs, or the error of its start.
_worker: tuple[Experiment, Teacher, Any] | Exception | None = None


def _start(*shared: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    try:
        _worker = _prepared(*shared)
    except Exception as error:
        # Raised here it would be lost; the first run reports it to the parent.
        _worker = error


def _prepared(
    shared: tuple, workers: int, numbers: Any, steps: Any, notices: Any
) -> tuple[Experiment, Teacher, Any]:
    number = numbers.get()
    if torch.cuda.device_count() > 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else list(map(str, range(workers)))
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number]
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    logger = logging.getLogger("otkd")
    logger.addHandler(logging.handlers.QueueHandler(notices))
    logger.setLevel(logging.INFO)
    quiet_libraries()
    experiment = make_experiment(*shared)
    return experiment, _find_teacher(experiment), steps


def _find_teacher(experiment: Experiment) -> Teacher:
    folder = experiment.folder / "teacher"
    teacher = find_teacher(experiment, folder, overwrite=False)
    if teacher is None:
        raise StudyError(
            f"The teacher in {folder} was changed by another program while its students were "
            "trained. Run the command again."
        )
    return teacher


def _run(run: Run) -> Result:
    global _worker
    if isinstance(_worker, Exception):
        raise _worker
    assert _worker is not None
    experiment, teacher, steps = _worker
    if teacher.lacks(run):
        # They were computed after this process had started.
        teacher = _find_teacher(experiment)
        _worker = experiment, teacher, steps
    return run_student(experiment, teacher, run, steps.put)
