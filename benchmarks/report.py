"""docs/benchmarks.md and its figures from the result files alone: `python benchmarks/report.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import figures
import tables
import tomllib
import typer
from run import GROUPS, RESULTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
_TITLES = {
    "vocabulary": "Transport over vocabularies",
    "batch": "Transport between the samples of a batch",
    "divergences": "f-divergences",
    "steps": "Whole training steps",
    "pareto": "Accuracy against cost",
    "limits": "What the machine could do",
    "gpu": "On a GPU",
}


def page(results: Path, images: dict[str, str]) -> str:
    """The page; rows without a result file are named as not measured.

    ``images`` are the paths of the figures, by ``GROUP/ROW``.
    """
    notes = _notes(results / "notes.toml")
    parts = [
        "# Benchmarks",
        "Made by `python benchmarks/report.py` from `benchmarks/results/`; what each number is and "
        "how it was measured stands in [benchmarks/README.md](../benchmarks/README.md). Ratios "
        "come first: **× otkd** is the time of a peer over that of otkd in the same process, round "
        "by round, so 10 is ten times slower than otkd and .5 twice as fast; least and greatest "
        "in brackets.",
    ]
    machines: dict[str, list[str]] = {}
    for group, rows in GROUPS.items():
        parts.append(f"## {_TITLES[group]}")
        for row in rows:
            place = f"{group}/{row}"
            path = results / f"{place}.json"
            if not path.is_file():
                parts.append(f"`{row}`: not measured.")
                continue
            result = json.loads(path.read_text("utf-8"))
            if not result["measured"]:
                parts.append(f"`{row}`: not measured ({result['reason']}).")
                continue
            where = {**result["machine"], **result["versions"]}
            line = ", ".join(f"{k} {v}" for k, v in where.items() if v is not None)
            machines.setdefault(line, []).append(place)
            parts += _row(row, result, images.get(place), notes.pop(place, None))
    if notes:
        raise ValueError(f"notes.toml speaks of rows that are not there: {', '.join(notes)}")
    parts.append("## Machines and versions")
    parts.append("\n".join(f"- {', '.join(rows)}: {line}" for line, rows in machines.items()))
    return "\n\n".join(parts) + "\n"


def _notes(path: Path) -> dict[str, str]:
    """What the figures do not say by themselves, such as why one falls short; by ``GROUP/ROW``."""
    if not path.is_file():
        return {}
    groups = tomllib.loads(path.read_text("utf-8"))
    return {f"{group}/{row}": text for group, rows in groups.items() for row, text in rows.items()}


def _row(name: str, result: dict, image: str | None, note: str | None) -> list[str]:
    parts = [f"### `{name}`", str(result["what"])]
    if image:
        parts.append(f"![{name}]({image})")
    if result["targets"]:
        parts.append(_markdown(tables.targets(result)).replace("| missed |", "| **missed** |"))
    if note:
        parts.append(note.strip())
    if rates := result.get("rates_a_second"):
        found = (f"{key} {value:.3g}" for key, value in rates.items())
        parts.append(f"Measured here, a second: {', '.join(found)}.")
    for case in result["cases"]:
        parts.append(f"**{case['name']}**")
        if fit := tables.exponent(case):
            parts.append(fit)
        if table := tables.case_table(case):
            parts.append(_markdown(table))
        if case.get("not_installed"):
            parts.append(f"Not installed: {', '.join(case['not_installed'])}.")
    return parts


def _markdown(table: tables.Table) -> str:
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (table.header, rule, *table.rows))


def main(
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    output: Annotated[Path, typer.Option(help="The page; figures go to images/ beside it.")] = PAGE,
) -> None:
    """Draw the figures, and write the page whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw_all(results, output.parent / "images")
    text = page(results, {place: f"images/{name}" for place, name in drawn.items()})
    unfinished = output.with_suffix(".unfinished")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, output)
    typer.echo(f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
