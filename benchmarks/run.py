"""otkd against its alternatives: time, memory, error. `run.py GROUP`; see README.md."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import batch_rows
import divergence_rows
import gpu_rows
import limit_rows
import measure
import pareto_rows
import step_rows
import tables
import torch
import typer
import vocabulary_rows
from compare import Settings
from rich.console import Console
from rich.table import Table

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
GROUPS = {
    "vocabulary": vocabulary_rows.ROWS,
    "batch": batch_rows.ROWS,
    "divergences": divergence_rows.ROWS,
    "steps": step_rows.ROWS,
    "pareto": pareto_rows.ROWS,
    "limits": limit_rows.ROWS,
    "gpu": gpu_rows.ROWS,
}


def is_finished(path: Path, settings: Settings) -> bool:
    """Whether a file holds this row, measured with these settings, and no GPU could add to it."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    expected = {"schema": SCHEMA, "row": path.stem}
    if not isinstance(result, dict) or any(result.get(k) != v for k, v in expected.items()):
        return False
    # A row with KeOps has everything that one without it has.
    wanted = asdict(settings)
    if result.get("settings") not in (wanted, {**wanted, "keops": True}):
        return False
    return result.get("measured", False) or not torch.cuda.is_available()


def run_row(measure_row: Callable[[Settings], dict], name: str, settings: Settings) -> dict:
    """Measure a row and say where."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        # Runs with a fixed number of iterations do not converge, and are not meant to.
        warnings.filterwarnings("ignore", message=".*converge")
        row = measure_row(settings)
    return {
        "schema": SCHEMA,
        "row": name,
        "what": (measure_row.__doc__ or "").partition("\n")[0],
        "settings": asdict(settings),
        "measured": True,
        "machine": measure.machine(),
        "versions": measure.versions(),
        "commit": measure.commit(),
        "seconds_of_the_row": round(time.perf_counter() - start, 1),
        **row,
    }


def show(console: Console, result: dict) -> None:
    """Print the figures of a row and its targets."""
    if not result["measured"]:
        console.print(f"[bold]{result['row']}[/bold]: not measured ({result['reason']})")
        return
    for case in result["cases"]:
        if fit := tables.exponent(case):
            console.print(f"{case['name']}: {fit}")
        elif found := tables.case_table(case):
            console.print(_rich(found, f"{result['row']}: {case['name']}"))
    if result["targets"]:
        console.print(_rich(tables.targets(result), "targets"))


def _rich(table: tables.Table, title: str) -> Table:
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(table.header):
        shown.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def main(
    group: Annotated[str, typer.Argument(help=f"One of {', '.join(GROUPS)}.")],
    rows: Annotated[str, typer.Option(help="Names, separated by commas; all by default.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; by default results/GROUP.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: whether it runs.")] = False,
    force: Annotated[bool, typer.Option(help="Measure finished rows again.")] = False,
    keops: Annotated[bool, typer.Option(help="GeomLoss with KeOps, too: needs pykeops.")] = False,
    seed: Annotated[int, typer.Option(help="Of logits, embeddings and models.")] = 0,
    repeats: Annotated[int, typer.Option(help="How often each peer is timed.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves its choice.")] = 0,
) -> None:
    """Measure the rows that are not finished, and print all that were asked for."""
    if group not in GROUPS:
        raise typer.BadParameter(f"no group {group!r}; there are {', '.join(GROUPS)}")
    known = GROUPS[group]
    names = rows.split(",") if rows else list(known)
    if unknown := sorted(set(names) - set(known)):
        raise typer.BadParameter(
            f"no row {', '.join(unknown)}; there are {', '.join(known)}", param_hint="--rows"
        )
    if threads:
        torch.set_num_threads(threads)
    logging.getLogger("otkd").setLevel(logging.WARNING)
    settings = Settings(quick=quick, seed=seed, repeats=repeats, keops=keops)
    output = output or RESULTS / group
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for name in names:
        path = output / f"{name}.json"
        if force or not is_finished(path, settings):
            console.print(f"measuring {name} …")
            measure.write_whole(path, run_row(known[name], name, settings))
        else:
            console.print(f"{name} is finished")
    for name in names:
        show(console, json.loads((output / f"{name}.json").read_text("utf-8")))


if __name__ == "__main__":
    typer.run(main)
