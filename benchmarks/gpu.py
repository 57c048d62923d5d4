"""Everything that wants a GPU, within some minutes: `python benchmarks/gpu.py`.

Rows are in the order of their worth. One that is there is not measured again; none is begun that
might not be done in time, so that a second call goes on. Of one that fails the file says why, and
the next is begun.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from compare import Settings
from gpu_rows import LONGEST, ROWS
from rich.console import Console
from run import Quick, Repeats, Seed, folder_of, is_finished, run_into, show


def main(
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; by default results/gpu.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="By when all is done, the half for starting not counted.", min=0)
    ] = 8.5,
    quick: Quick = False,
    seed: Seed = 0,
    repeats: Repeats = None,
) -> None:
    """Measure what is not finished and print it."""
    start, console = time.monotonic(), Console(width=120)
    folder = folder_of("gpu", output, quick=quick)
    settings = Settings(quick=quick, seed=seed, repeats=repeats or Settings.repeats)
    for name, row in ROWS.items():
        path = folder / f"{name}.json"
        if not is_finished(path, settings, repeats=repeats):
            if time.monotonic() - start + LONGEST[name] > 60 * minutes:
                console.print(f"{name}: left for another call, it may take too long for this one")
                continue
            run_into(path, row, settings, console)
        show(console, json.loads(path.read_text("utf-8")))


if __name__ == "__main__":
    typer.run(main)
