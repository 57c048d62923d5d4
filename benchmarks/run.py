"""Measures otkd and its alternatives: `run.py GROUP`; see README.md."""

from __future__ import annotations

import json
import logging
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import batch_rows
import divergence_rows
import files
import gpu_rows
import kernel_rows
import limit_rows
import machine
import pareto_rows
import step_rows
import tables
import torch
import transport_kl_rows
import typer
import vocabulary_rows
from compare import Row, Settings
from rich.console import Console
from rich.table import Table

from otkd.ot.kernels.keops import obstacle_to_keops

SCHEMA = 1
GROUPS = {
    "vocabulary": vocabulary_rows.ROWS,
    "transport_kl": transport_kl_rows.ROWS,
    "batch": batch_rows.ROWS,
    "divergences": divergence_rows.ROWS,
    "steps": step_rows.ROWS,
    "pareto": pareto_rows.ROWS,
    "kernels": kernel_rows.ROWS,
    "limits": limit_rows.ROWS,
    "gpu": gpu_rows.ROWS,
}


# Options of gpu.py, too.
Quick = Annotated[bool, typer.Option(help="Tiny sizes, to see that it runs. Needs --output.")]
Seed = Annotated[int, typer.Option(help="Seed of logits, embeddings and models.")]
Repeats = Annotated[
    int | None,
    typer.Option(
        help=f"How often each peer is timed, by default {Settings.repeats}. If given, finished "
        "rows with fewer repeats are measured again.",
        min=1,
        show_default=False,
    ),
]


def folder_of(group: str, output: Path | None, *, quick: bool) -> Path:
    """Where results go. Those of tiny sizes must not replace the others."""
    if quick and output is None:
        raise typer.BadParameter("--quick needs a folder of its own: --output FOLDER")
    return output or files.RESULTS / group


def is_finished(
    path: Path, settings: Settings, *, repeats: int | None = None, keops: bool | None = None
) -> bool:
    """Whether a file holds this row with these settings, measured as far as this machine can.

    ``repeats`` and ``keops`` are what the user asked for explicitly: the row has at least that.
    """
    result = files.read(path)
    held = result.get("settings", {})
    found = [result.get("schema"), result.get("row"), held.get("quick"), held.get("seed")]
    if found != [SCHEMA, path.stem, settings.quick, settings.seed]:
        return False
    if held.get("repeats", 0) < (repeats or 0) or (keops and not held.get("keops")):
        return False
    without_gpu = result.get("reason") == "no GPU" and not torch.cuda.is_available()
    return result.get("measured", False) or without_gpu


def run_into(path: Path, measure_row: Row, settings: Settings, console: Console) -> None:
    """Measure a row and write it. A failure does not replace an earlier measurement."""
    result = run_row(measure_row, path.stem, settings)
    if files.read(path).get("measured") and not result["measured"]:
        text = f"{path.stem}: not measured ({result['reason']}); the earlier measurement is kept"
        console.print(text, markup=False)
    else:
        files.write(path, result)


def run_row(measure_row: Row, name: str, settings: Settings) -> dict:
    """Measure a row; one that fails is stored with the reason, so that the others go on."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # Runs with a fixed number of iterations are not meant to converge.
            warnings.filterwarnings("ignore", message=".*converge")
            row = measure_row(settings)
    except Exception as error:
        traceback.print_exc()
        row = files.unmeasured(files.said(error))
    return {
        "schema": SCHEMA,
        "row": name,
        "what": (measure_row.__doc__ or "").partition("\n")[0],
        "settings": asdict(settings),
        "measured": True,
        "machine": machine.hardware(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "seconds_of_the_row": round(time.perf_counter() - start, 1),
        "targets": [],
        **row,
    }


def show(console: Console, result: dict) -> None:
    """Print the numbers of a row and its targets."""
    if not result["measured"]:
        console.print(f"{result['row']}: not measured ({result['reason']})", markup=False)
        return
    for case in result["cases"]:
        for peer, why in case.get("refused", {}).items():
            console.print(f"{case['name']}: {peer} cannot be measured: {why}", markup=False)
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
    quick: Quick = False,
    force: Annotated[bool, typer.Option(help="Measure finished rows again.")] = False,
    keops: Annotated[
        bool | None,
        typer.Option(
            help="Also measure GeomLoss with KeOps; by default if KeOps works. If given, finished "
            "rows without it are measured again.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    repeats: Repeats = None,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0: its own choice.", min=0)] = 0,
) -> None:
    """Measure the rows that are not finished, and print all of the chosen ones."""
    if group not in GROUPS:
        raise typer.BadParameter(f"no group {group!r}; there are {', '.join(GROUPS)}")
    known = GROUPS[group]
    names = rows.split(",") if rows else list(known)
    if unknown := sorted(set(names) - set(known)):
        raise typer.BadParameter(
            f"no row {', '.join(unknown)}; there are {', '.join(known)}", param_hint="--rows"
        )
    output = folder_of(group, output, quick=quick)
    if threads:
        torch.set_num_threads(threads)
    logging.getLogger("otkd").setLevel(logging.WARNING)
    settings = Settings(
        quick=quick,
        seed=seed,
        repeats=repeats or Settings.repeats,
        keops=obstacle_to_keops(torch.device("cpu")) is None if keops is None else keops,
    )
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for name in names:
        path = output / f"{name}.json"
        if force or not is_finished(path, settings, repeats=repeats, keops=keops):
            console.print(f"measuring {name} …")
            run_into(path, known[name], settings, console)
        else:
            console.print(f"{name} is finished")
    for name in names:
        show(console, json.loads((output / f"{name}.json").read_text("utf-8")))


if __name__ == "__main__":
    typer.run(main)
