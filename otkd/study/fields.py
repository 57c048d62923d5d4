"""What the fields of a result file may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

FINISHED, DIVERGED = "finished", "diverged"
LARGEST_SEED = 2**32 - 1
# Matthews' coefficient goes down to −1; single precision may round a metric past its bounds.
_LOWEST, _HIGHEST = -1 - 1e-6, 1 + 1e-6
_MANY = 2**63


def _is_number(value: Any, low: float, high: float) -> bool:
    # Not isinstance: true and false are no numbers. NaN is in no range.
    return type(value) in (int, float) and low <= value <= high


def _is_count(value: Any, low: int = 0, high: int = _MANY) -> bool:
    return type(value) is int and low <= value <= high


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return _is_text(value) and value != ""


def _is_table(value: Any, holds: Callable[[Any], bool] = lambda value: True) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))


def _is_metric(value: Any) -> bool:
    return _is_number(value, _LOWEST, _HIGHEST)


def _is_evaluation(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_count(value.get("step")):
        return False
    return all(_is_metric(metric) for name, metric in value.items() if name != "step")


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task": (_is_name, "a name"),
    "loss": (_is_name, "a name"),
    "seed": (lambda value: _is_count(value, 0, LARGEST_SEED), "a whole number below 2³²"),
    "settings": (_is_table, "a table"),
    "headline": (_is_name, "the name of a metric"),
    "metrics": (lambda value: _is_table(value, _is_metric), "a table of fractions"),
    "teacher_metrics": (lambda value: _is_table(value, _is_metric), "a table of fractions"),
    "agreement": (lambda value: value is None or _is_number(value, 0, _HIGHEST), "a fraction"),
    "teacher_logits": (_is_text, "a hash"),
    "rows": (
        lambda value: _is_table(value, _is_count) and {"train", "dev"} <= value.keys(),
        "the numbers of train and dev rows",
    ),
    "steps": (_is_count, "a whole number of at least 0"),
    "seconds": (lambda value: _is_number(value, 0, _MANY), "a number of at least 0"),
    "precision": (lambda value: value in ("fp32", "bf16"), "fp32 or bf16"),
    "versions": (lambda value: _is_table(value, _is_text), "a table of versions"),
    "machine": (_is_table, "a table"),
    "majority_metrics": (lambda value: _is_table(value, _is_metric), "a table of fractions"),
    "evaluations": (
        lambda value: isinstance(value, list) and all(map(_is_evaluation, value)),
        "a list of tables, each with a step and fractions",
    ),
    "files": (lambda value: _is_table(value, _is_text), "a table of hashes"),
    "status": (lambda value: value in (FINISHED, DIVERGED), f"{FINISHED} or {DIVERGED}"),
    "reason": (_is_text, "a text"),
    "finished": (_is_time, "a time (ISO 8601)"),
}


def check_fields(content: Mapping[str, Any]) -> None:
    """Check every field of a result for its kind and range, and that they fit each other.

    Raises:
        ValueError: saying which field cannot be meant.
    """
    missing = [name for name in _FIELDS if name not in content]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    for name, (holds, what) in _FIELDS.items():
        if not holds(content[name]):
            raise ValueError(f"has a field {name!r} that is not {what}")
    if content["status"] == FINISHED:
        if content["headline"] not in content["metrics"]:
            raise ValueError(f"has no metric {content['headline']!r}, its headline")
        if content["agreement"] is None:
            raise ValueError("has no agreement")
    elif content["metrics"] or content["agreement"] is not None or not content["reason"]:
        raise ValueError("is of a diverged run, which has a reason and no metrics")
    for name in ("task", "seed"):
        if content["settings"].get(name, content[name]) != content[name]:
            raise ValueError(f"has another {name} than its settings")
