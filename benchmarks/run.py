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
import measure
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
}


def is_finished(path: Path, settings: Settings) -> bool:
    """Whether a file holds this row, measured with these settings, and no GPU could add to it."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    expected = {"schema": SCHEMA, "row": path.stem, "settings": asdict(settings)}
    if not isinstance(result, dict) or any(result.get(k) != v for k, v in expected.items()):
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
        "what": measure_row.__doc__,
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
        title = f"{result['row']}: {case['name']}"
        if "coverage_of_64" in case:
            title += f", coverage {_number(case['coverage_of_64'])}"
        table = Table(title=title, title_justify="left")
        table.add_column("k" if "curve" in case else "peer", no_wrap=True)
        columns = ("value error", "gradient error", "coverage")
        if "peers" in case:
            columns = ("seconds", "× otkd", "peak / N·V·4", "value error", "gradient error")
        for column in columns:
            table.add_column(column, justify="right")
        for point in case.get("curve", ()):
            fields = ("value_error", "gradient_error", "coverage")
            name = f"{point['k']}, {point['clusters']} tail atoms"
            table.add_row(name, *(_number(point[field]) for field in fields))
        for name, found in case.get("peers", {}).items():
            table.add_row(
                name,
                _spread(found.get("seconds")),
                _spread(case["times"].get(name)),
                *map(_number, (found.get(key) for key in ("peak_units", *_ERRORS))),
            )
        if "exponent" in case:
            fit = case["exponent"]
            console.print(f"{case['name']}: {fit['exponent']:.2f} ± {fit['interval']:.2f}")
        else:
            console.print(table)
    for target in result["targets"]:
        mark = {True: "[green]met[/green]", False: "[red]missed[/red]", None: "not measured"}
        wanted = f"{target['relation']} {target['limit']:g}"
        console.print(
            f"  {target['name']}: {_number(target['measured'])} ({wanted}), {mark[target['met']]}"
        )


_ERRORS = ("value_error", "gradient_error")


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}"


def _spread(found: dict | None) -> str:
    if found is None:
        return "–"
    return f"{found['median']:.3g} ({found['low']:.3g}–{found['high']:.3g})"


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
