"""How results were made, against what their protocol says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from otkd.cli.glue.collect import Study, TaskResults
from otkd.cli.objectives import objective_options
from otkd.cli.protocols import Objective, Protocol
from otkd.cli.results import Result
from otkd.cli.settings import Settings

# Rows of train and of dev (all its splits): Wang et al. (2019), "GLUE: A Multi-Task Benchmark and
# Analysis Platform for Natural Language Understanding", as the released files have them.
_ROWS = {
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mnli": (392702, 19647),
    "mrpc": (3668, 408),
    "rte": (2490, 277),
    "qnli": (104743, 5463),
    "qqp": (363849, 40430),
    "wnli": (635, 71),
}
# Editions of a file differ by a few rows; a sample of it is smaller by more.
_TOLERANCE = 0.01
# What `auto` and an unnamed model stand for is not settled by the protocol.
_OPEN = {"precision": "auto", "teacher": None, "student": None}
_ABSENT = "–"


@dataclass(frozen=True)
class Departure:
    """A setting of some losses of a task, by their names, that is not the protocol's."""

    task: str
    setting: str
    wanted: str
    found: str
    losses: tuple[str, ...]


def departures(study: Study, pair: Mapping[str, str]) -> list[Departure]:
    """What differs between the settings of results and those of their protocol, task by task.

    A candidate is compared with what its number stands for, and students of a loss that was tuned
    with the nearest candidate, and that with the one which tuning found best.

    Args:
        study: protocol and results.
        pair: the names of teacher and student that the protocol was published with, if any.
    """
    found: dict[tuple[str, str, str, str], dict[str, None]] = {}
    for results in study.tasks.values():
        for loss, objective in _objectives(study, results).items():
            differing = [
                difference
                for run in results.runs[loss].values()
                for difference in _differences(objective, _nearest(objective, run)[1], run, pair)
            ]
            for number, run in results.tuning[loss].items():
                wanted = _of_candidate(study.protocol, objective, number)
                differing += [] if wanted is None else _differences(objective, wanted, run, pair)
            differing += _other_choices(objective, results, loss)
            for difference in differing:
                found.setdefault((results.task.name, *difference), {})[loss] = None
    return [Departure(*key, losses=tuple(losses)) for key, losses in found.items()]


def setting_name(name: str) -> str:
    """A setting for readers: ``loss.sinkhorn_weight`` is ``sinkhorn weight``."""
    return name.removeprefix("loss.").replace("_", " ")


def setting_value(value: Any) -> str:
    """Its value: small numbers as ``4e-4``, truth as yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return _ABSENT
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return str(value)


def chosen_candidate(study: Study, results: TaskResults, loss: str) -> int | None:
    """The number of the candidate that the students of a loss were trained with."""
    objective = _objectives(study, results)[loss]
    runs = list(results.runs[loss].values())
    return _nearest(objective, runs[0])[0] if runs and objective.candidates else None


def best_candidate(results: TaskResults, loss: str) -> int | None:
    """The candidate with the best held-out score, the first of equals."""
    tried = results.tuning[loss]
    return max(sorted(tried), key=lambda number: tried[number].score) if tried else None


def candidate_label(candidate: Mapping[str, Any]) -> str:
    """The settings of a candidate in one line."""
    return ", ".join(f"{setting_name(k)} {setting_value(v)}" for k, v in candidate.items())


def _objectives(study: Study, results: TaskResults) -> dict[str, Objective]:
    protocol = study.protocol
    shared = protocol.resolve(Settings(results.task.name), ())
    return {each.name: each for each in protocol.objectives(shared, ())}


def _settings(objective: Objective) -> dict[str, Any]:
    """What an objective's results have among their settings."""
    names = [item.name for item in fields(Settings)]
    values = {name: getattr(objective.settings, name) for name in names}
    options = objective_options(objective.loss, objective.settings)
    return {**values, "loss": objective.loss} | {f"loss.{k}": v for k, v in options.items()}


def _nearest(objective: Objective, run: Result) -> tuple[int, dict[str, Any]]:
    """Of the settings that an objective may have, those with the fewest differences to a run."""
    tried = [_settings(variant) for variant in objective.tried()]

    def distance(number: int) -> int:
        return sum(run.settings[k] != v for k, v in tried[number].items() if k in run.settings)

    number = min(range(len(tried)), key=distance)
    return number, tried[number]


def _of_candidate(protocol: Protocol, objective: Objective, number: int) -> dict[str, Any] | None:
    """The settings that a candidate is trained with; None if the protocol does not have it."""
    tuning = protocol.tuning
    if tuning is None or number >= len(objective.candidates):
        return None
    settings = _settings(objective.tried(**tuning.settings)[number])
    return {**settings, "tuning_rows": tuning.train_rows, "held_out": tuning.held_out}


def _differences(
    objective: Objective, wanted: Mapping[str, Any], run: Result, pair: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """Name, the protocol's value, the run's."""
    found = run.settings
    names = [k for k in wanted if k in found or k.startswith("loss.")]
    names += [k for k in found if k.startswith("loss.") and k not in wanted]
    differing = [
        (setting_name(k), setting_value(wanted.get(k)), setting_value(found.get(k)))
        for k in names
        if wanted.get(k) != found.get(k)
        and not (k in _OPEN and wanted.get(k) == _OPEN[k])
        and k not in pair
    ]
    student = found.get("student") or f"{found.get('student_layers')} layers of the teacher"
    here = {"teacher": found.get("teacher"), "student": student}
    differing += [(k, v, str(here[k])) for k, v in pair.items() if k in here and here[k] != v]
    return [*differing, *_row_differences(objective.settings, run)]


def _row_differences(settings: Settings, run: Result) -> list[tuple[str, str, str]]:
    whole = _ROWS.get(run.task)
    if whole is None:
        return []
    limits = (settings.max_train_rows, settings.max_dev_rows)
    differing = []
    for split, rows, limit in zip(("train", "dev"), whole, limits, strict=True):
        wanted = min(rows, limit or rows)
        found = run.settings.get(f"{split}_rows", wanted)
        if abs(found - wanted) > _TOLERANCE * wanted:
            differing.append((f"{split} rows", f"{wanted:,}", f"{found:,}"))
    return differing


def _other_choices(
    objective: Objective, results: TaskResults, loss: str
) -> list[tuple[str, str, str]]:
    """Students with a candidate that is not the best of those on file."""
    best = best_candidate(results, loss)
    if best is None or best >= len(objective.candidates):
        return []
    labels = [candidate_label(candidate) for candidate in objective.candidates]
    numbers = {_nearest(objective, run)[0] for run in results.runs[loss].values()}
    return [("candidate", labels[best], labels[number]) for number in sorted(numbers - {best})]
