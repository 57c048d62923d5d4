"""The result files of the pilot study, and their table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from otkd.files import write_json
from otkd.study.messages import StudyError
from otkd.study.results import settings_hash
from otkd.study.summary import Estimate, estimate

BASELINE = "kl"
COLUMNS = {
    "cross_entropy": "cross-entropy",
    "kl": "KL(p‖q)",
    "reverse_kl": "KL(q‖p)",
    "tvd": "TVD",
    "sinkhorn": "Sinkhorn",
    "agreement": "agreement",
    "accuracy": "accuracy",
}
# The columns that have differences to KL.
_COMPARED = ("cross_entropy", "kl")


def result_path(folder: Path, start: str, objective: str, seed: int) -> Path:
    """The file of a run."""
    return folder / start / objective / f"seed-{seed}.json"


def write_result(path: Path, settings: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write a result with what decided it."""
    write_json(path, {"settings_hash": settings_hash(settings), "settings": settings, **content})


def is_finished(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether there is a result with these settings.

    Raises:
        StudyError: if there is one with other settings.
    """
    if not path.is_file():
        return False
    found = read_result(path)["settings"]
    # As JSON, where tuples are lists.
    wanted = json.loads(json.dumps(settings))
    other = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if other:
        raise StudyError(
            f"{path} was made with other settings ({', '.join(other)}). Move it elsewhere, or "
            "choose another --output-dir."
        )
    return True


def read_result(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        StudyError: if the file is not a result of this study.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["settings_hash"] != settings_hash(result["settings"]):
            raise ValueError("its settings were changed")
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is not a result of this study: {error}") from error
    return result


def tables(folder: Path) -> list[Table]:
    """A table of the results of each start: means over seeds, and differences to KL."""
    starts: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*/*/seed-*.json")):
        result = read_result(path)
        settings = result["settings"]
        runs = starts.setdefault(settings["start"], {}).setdefault(settings["objective"], {})
        runs[settings["seed"]] = result
    return [_table(start, objectives) for start, objectives in sorted(starts.items())]


def _table(start: str, objectives: dict[str, dict[int, dict[str, Any]]]) -> Table:
    table = Table(title=f"Start: {start}", caption=_caption(objectives))
    table.add_column("objective", no_wrap=True)
    titles = [*COLUMNS.values(), *(f"Δ {COLUMNS[name]}" for name in _COMPARED)]
    for title in ("seeds", *titles, "s/step"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, runs in sorted(objectives.items()):
        ended = {seed: run for seed, run in runs.items() if run["status"] == "finished"}
        diverged = len(runs) - len(ended)
        seeds = f"{len(ended)} + {diverged} diverged" if diverged else str(len(ended))
        if not ended:
            table.add_row(name, seeds)
            continue
        means = [fmean(_mean(run, metric) for run in ended.values()) for metric in COLUMNS]
        table.add_row(
            name,
            seeds,
            *(f"{mean:.4f}" for mean in means),
            *(_shown(_difference(ended, objectives.get(BASELINE, {}), m)) for m in _COMPARED),
            f"{fmean(run['seconds_per_step'] for run in ended.values()):.2f}",
        )
    return table


def _mean(run: dict[str, Any], metric: str) -> float:
    return fmean(run["held_out"][metric])


def _difference(
    runs: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]], metric: str
) -> Estimate | None:
    """The difference to KL with the same seeds; None if there is no such seed, and for KL."""
    pairs = [(run, baseline[seed]) for seed, run in runs.items() if seed in baseline]
    pairs = [(run, base) for run, base in pairs if base["status"] == "finished" and run is not base]
    if not pairs:
        return None
    return estimate([_mean(run, metric) - _mean(base, metric) for run, base in pairs])


def _shown(difference: Estimate | None) -> str:
    if difference is None:
        return ""
    if difference.interval is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} ± {difference.interval:.4f}"


def _caption(objectives: dict[str, dict[int, dict[str, Any]]]) -> str:
    for runs in objectives.values():
        for run in runs.values():
            if run["status"] == "finished":
                values = [_mean(run, f"teacher_{name}") for name in ("cross_entropy", "accuracy")]
                return (
                    f"Teacher: cross-entropy {values[0]:.4f}, accuracy {values[1]:.4f}. Δ is the "
                    "difference to KL with the same seeds, with its 95 % t-interval over seeds."
                )
    return ""
