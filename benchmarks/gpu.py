"""Everything that wants a GPU, within some minutes: `python benchmarks/gpu.py`.

Rows are in the order of their worth. One that is there is not measured again; none is begun when
the time is up, so that a second call goes on.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import measure
import typer
from compare import Settings
from gpu_rows import ROWS
from rich.console import Console
from run import RESULTS, is_finished, run_row, show


def main(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS / "gpu",
    minutes: Annotated[float, typer.Option(help="When no further row is begun.", min=0)] = 7.0,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: whether it runs.")] = False,
    seed: Annotated[int, typer.Option(help="Of logits, embeddings and models.")] = 0,
    repeats: Annotated[int, typer.Option(help="How often each peer is timed.", min=1)] = 10,
) -> None:
    """Measure what is not finished and print it."""
    start, console = time.monotonic(), Console(width=120)
    settings = Settings(quick=quick, seed=seed, repeats=repeats)
    for name, row in ROWS.items():
        path = output / f"{name}.json"
        if not is_finished(path, settings):
            if time.monotonic() - start > 60 * minutes:
                console.print(f"{name}: left for another call, the time is up")
                continue
            measure.write_whole(path, run_row(row, name, settings))
        show(console, json.loads(path.read_text("utf-8")))


if __name__ == "__main__":
    typer.run(main)
