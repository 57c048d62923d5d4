"""What the command prints: results, notices, errors and a progress bar; and how it ends."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from otkd.extras import missing
from otkd.files import sentence
from otkd.study.messages import StudyError
from otkd.tasks import DataError

# Results go to stdout, everything else to stderr, so that a table can be piped.
out = Console()
err = Console(stderr=True)
if not out.is_terminal:
    # A file has no width, and a table should not be cut to that of a small terminal.
    out.width = max(out.width, 120)

_TRAIN_MODULES = ("accelerate", "datasets", "filelock", "matplotlib", "safetensors")
_TRAIN_MODULES += ("torchmetrics", "transformers")


def print_table(table: Table) -> None:
    """Print a table on stdout whole: beyond the width of the terminal, which would cut numbers."""
    unlimited = out.options.update(width=10_000)
    table.width = Measurement.get(out, unlimited, table).maximum
    out.print(table, crop=False)


def notice(message: str, style: str | None = "dim") -> None:
    """Print a message on stderr."""
    err.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


class _Notices(logging.Handler):
    """Prints what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        notice(record.getMessage())


class _Interrupted(KeyboardInterrupt):
    """A signal asks this process to end: like Ctrl-C, with another exit status."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextmanager
def reporting(output_dir: Path, *, resumes: bool = True) -> Iterator[None]:
    """Print the notices of a command, and turn errors and signals into a message and a status.

    Args:
        output_dir: folder of the results, for the messages.
        resumes: whether finished runs are kept there, so that the same command continues. Otherwise
            the command writes its results at its end, and starts again if it was interrupted.
    """
    handler, logger = _Notices(), logging.getLogger("otkd")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(), _interrupted_by_signals():
            # Without the place in the code, which Python puts before it.
            warnings.showwarning = lambda message, *rest: notice(f"Warning: {message}")
            yield
    except (StudyError, DataError) as error:
        notice(f"Error: {error}", style="red")
        raise typer.Exit(1) from error
    except BrokenPipeError:
        raise  # the reader of the output has closed it
    except OSError as error:
        kept = f" Finished runs are kept in {output_dir}." if resumes else ""
        notice(f"Error: {sentence(error)}{kept}", style="red")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        name, number = "Interrupted", signal.SIGINT
        if isinstance(interrupt, _Interrupted):
            name, number = f"Ended by {signal.Signals(interrupt.number).name}", interrupt.number
        if resumes:
            state = f"finished runs are kept in {output_dir}; the same command continues"
        else:
            state = f"nothing was written to {output_dir}; the same command starts again"
        notice(f"{name}: {state}.", style=None)
        raise typer.Exit(128 + number) from None
    finally:
        logger.removeHandler(handler)


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Raise an exception for SIGTERM and SIGHUP, which would end the process without a message."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # An ignored signal, as under nohup, stays ignored.
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted(number)


def require_train_extra() -> None:
    """Check that the packages of the ``train`` extra are installed, without importing them.

    Raises:
        StudyError: if one is missing, with the command that installs it.
    """
    message = missing("This command", *_TRAIN_MODULES, extra="train")
    if message:
        raise StudyError(message)


class StepBar:
    """A progress bar over the steps of all runs; its total grows as work is planned."""

    def __init__(self):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
            # Teachers are slower than students; a long period keeps the estimate steady.
            speed_estimate_period=60,
        )
        self._total = 0
        self._task = None

    def __enter__(self) -> StepBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def plan(self, steps: int) -> None:
        """Add steps to the total."""
        self._total += steps
        if self._task is None:
            self._task = self._bar.add_task("", total=self._total)
        else:
            self._bar.update(self._task, total=self._total)

    def start(self, description: str) -> Callable[[int], None]:
        """Name the run under way; the function that is returned counts its steps."""
        task = self._task
        if task is None:
            return lambda steps: None
        self._bar.update(task, description=description)
        return lambda steps: self._bar.advance(task, steps)

    def finished(self, text: str) -> None:
        """Report a finished run in a log, which has no bar."""
        if not err.is_terminal:
            notice(text)
