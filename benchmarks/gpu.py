"""Everything that needs a GPU, within a few minutes: `python benchmarks/gpu.py`.

The most important rows come first. Finished rows are not measured again, and a row that might not
finish in time is not started, so a second call continues. A row that fails is stored with the
reason.
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
        float, typer.Option(help="Time limit, without the half minute for starting.", min=0)
    ] = 8.5,
    quick: Quick = False,
    seed: Seed = 0,
    repeats: Repeats = None,
) -> None:
    """Measure the rows that are not finished, and print all of them."""
    start, console = time.monotonic(), Console(width=120)
    folder = folder_of("gpu", output, quick=quick)
    settings = Settings(quick=quick, seed=seed, repeats=repeats or Settings.repeats)
    for name, row in ROWS.items():
        path = folder / f"{name}.json"
        if not is_finished(path, settings, repeats=repeats):
            if time.monotonic() - start + LONGEST[name] > 60 * minutes:
                console.print(f"{name}: left for another call, it might exceed the time limit")
                continue
            run_into(path, row, settings, console)
        show(console, json.loads(path.read_text("utf-8")))


if __name__ == "__main__":
    typer.run(main)
