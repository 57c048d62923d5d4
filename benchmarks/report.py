"""docs/benchmarks.md from the result files alone: `python benchmarks/report.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from run import GROUPS, RESULTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
_TITLES = {
    "vocabulary": "Transport over vocabularies",
    "batch": "Transport between the samples of a batch",
    "divergences": "f-divergences",
}
_NONE = "–"
# What a peer may have been measured for, in the order of the columns.
_COLUMNS = {
    "value_error": "value error",
    "gradient_error": "gradient error",
    "peak_units": "peak, N·V·4 bytes",
    "finite_without_mass": "finite at −inf",
    "least_value": "least value",
}


def page(results: Path) -> str:
    """The page; groups and rows without a result file are named as not measured."""
    parts = [
        "# Benchmarks",
        "Made by `python benchmarks/report.py` from `benchmarks/results/`; what each number is and "
        "how it was measured stands in [benchmarks/README.md](../benchmarks/README.md). Ratios "
        "come first: **× otkd** is the time of a peer over that of otkd in the same process, round "
        "by round, so 10 is ten times slower than otkd and .5 twice as fast; least and greatest "
        "in brackets.",
    ]
    machines = {}
    for group, rows in GROUPS.items():
        parts.append(f"## {_TITLES[group]}")
        for row in rows:
            path = results / group / f"{row}.json"
            if not path.is_file():
                parts.append(f"`{row}`: not measured.")
                continue
            result = json.loads(path.read_text("utf-8"))
            if not result["measured"]:
                parts.append(f"`{row}`: not measured ({result['reason']}).")
                continue
            where = {**result["machine"], **result["versions"]}
            line = ", ".join(f"{k} {v}" for k, v in where.items() if v is not None)
            machines.setdefault(line, []).append(f"{group}/{row}")
            parts += _row(row, result)
    parts.append("## Machines and versions")
    parts.append("\n".join(f"- {', '.join(rows)}: {line}" for line, rows in machines.items()))
    return "\n\n".join(parts) + "\n"


def _row(name: str, result: dict) -> list[str]:
    parts = [f"### `{name}`", str(result["what"])]
    for case in result["cases"]:
        parts.append(f"**{case['name']}**")
        if "exponent" in case:
            fit = case["exponent"]
            parts.append(f"time ∝ size^({fit['exponent']:.2f} ± {fit['interval']:.2f})")
        parts += [_curve(case), _peers(case)]
    if result["targets"]:
        marks = {True: "met", False: "**missed**", None: "not measured"}
        lines = [
            [t["name"], _number(t["measured"]), f"{t['relation']} {t['limit']:g}", marks[t["met"]]]
            for t in result["targets"]
        ]
        parts.append(_table(["figure", "measured", "wanted", ""], lines))
    return [part for part in parts if part]


def _peers(case: dict) -> str:
    peers = case.get("peers", {})
    if not peers:
        return ""
    keys = [key for key in _COLUMNS if any(key in peer for peer in peers.values())]
    rows = []
    for name, found in peers.items():
        times, seconds = case["times"].get(name), found.get("seconds")
        values = [_number(found.get(key)) for key in keys]
        rows.append([name, _spread(times), _spread(seconds, medians=True), *values])
    return _table(["peer", "× otkd", "seconds", *(_COLUMNS[key] for key in keys)], rows)


def _curve(case: dict) -> str:
    points = case.get("curve") or case.get("points") or []
    if not points:
        return ""
    keys = [key for key in points[0] if key != "seconds"]
    header = [*keys, "seconds"] if "seconds" in points[0] else keys
    rows = []
    for point in points:
        row = [_number(point[key]) for key in keys]
        rows.append([*row, _spread(point["seconds"])] if "seconds" in point else row)
    return _table([name.replace("_", " ") for name in header], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _number(value: float | bool | None) -> str:
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _spread(found: dict | None, *, medians: bool = False) -> str:
    if found is None:
        return _NONE
    median = f"{found['median']:.3g}"
    return median if medians else f"{median} ({found['low']:.3g}–{found['high']:.3g})"


def main(
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    output: Annotated[Path, typer.Option(help="The page.")] = PAGE,
) -> None:
    """Write the page whole or not at all."""
    text = page(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".unfinished")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, output)
    typer.echo(f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
