"""One progress bar over the steps of all runs."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from otkd.cli.console import err


class StepBar:
    """A bar whose total grows as work is planned; a context manager."""

    def __init__(self):
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
            # Teachers are slower than students: a long memory keeps the estimate from jumping.
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
        """Name the run under way; the function returned counts its steps."""
        task = self._task
        if task is None:
            return lambda steps: None
        self._bar.update(task, description=description)
        return lambda steps: self._bar.advance(task, steps)
