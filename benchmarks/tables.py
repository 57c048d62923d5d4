"""Results as tables of text, for the console and for the page."""

from __future__ import annotations

from typing import NamedTuple

_NONE = "–"
# The columns of a table of peers, in order; those that no peer has are left out.
_COLUMNS = {
    "value_error": "value error",
    "gradient_error": "gradient error",
    "peak_units": "peak, N·V·4 bytes",
    "peak_matrices": "peak, b·b·4 bytes",
    "finite_without_mass": "finite at −inf",
    "least_value": "least value",
    "right": "right",
    "loss": "loss",
}
_MARKS = {True: "met", False: "missed", None: "not measured"}


class Table(NamedTuple):
    """A heading and rows of cells."""

    header: list[str]
    rows: list[list[str]]


def case_table(case: dict) -> Table | None:
    """The points or the peers of a case, whichever it has."""
    if case.get("points"):
        return _points(case["points"])
    return _peers(case) if case.get("peers") else None


def exponent(case: dict) -> str | None:
    """The fitted exponent of a case that has one."""
    if "exponent" not in case:
        return None
    fit = case["exponent"]
    text = f"time ∝ size^({fit['exponent']:.2f} ± {fit['interval']:.2f})"
    if fit.get("half_at") is not None:
        text += f"; the growing part is half of the time at {number(fit['half_at'])}"
    return text


def targets(result: dict) -> Table:
    """What was measured, what was aimed at, and whether that is met."""
    rows = [
        [
            t["name"],
            number(t["measured"]),
            f"{t['relation']} {number(t['limit'])}",
            _MARKS[t["met"]],
        ]
        for t in result["targets"]
    ]
    return Table(["quantity", "measured", "aim", ""], rows)


def _peers(case: dict) -> Table:
    peers = case["peers"]
    keys = [key for key in _COLUMNS if any(key in peer for peer in peers.values())]
    timed = any("seconds" in peer for peer in peers.values())
    rows = []
    for name, found in peers.items():
        times = [_spread(case["times"].get(name)), _median(found.get("seconds"))]
        rows.append([name, *(times if timed else ()), *(number(found.get(key)) for key in keys)])
    times = [f"time ÷ {case.get('times_against', 'otkd')}", "seconds"] if timed else []
    return Table(["", *times, *(_COLUMNS[key] for key in keys)], rows)


def _points(points: list[dict]) -> Table:
    keys = [key for key in points[0] if key not in ("seconds", "peak_bytes", "peak_method")]
    timed = "seconds" in points[0]
    rows = [
        [*(number(point[key]) for key in keys), *([_spread(point["seconds"])] if timed else ())]
        for point in points
    ]
    names = [_COLUMNS.get(name, name.replace("_", " ")) for name in keys]
    header = names + ["seconds"] * timed
    return Table(header, rows)


def number(value: float | bool | str | dict[str, float] | None) -> str:
    """A number with three digits; text unchanged; a mapping as amounts with their names."""
    if value is None or value == {}:
        return _NONE
    if isinstance(value, dict):
        return ", ".join(f"{number(amount)} {kind}" for kind, amount in value.items())
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _median(found: dict | None) -> str:
    return _NONE if found is None else f"{found['median']:.3g}"


def _spread(found: dict | None) -> str:
    if found is None:
        return _NONE
    return f"{found['median']:.3g} ({found['low']:.3g}–{found['high']:.3g})"
