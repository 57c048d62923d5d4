"""Result files: one JSON file per run, checked when it is written and when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from otkd.files import write_json
from otkd.study.settings import STRICT, Seed
from otkd.study.validation import first_mistake
from otkd.tasks import get_metric

# Schema 1 had no hash of the whole content, and no diverged runs.
SCHEMA = 2
_LARGEST = 64 * 2**20  # bytes; a result with an evaluation at every step is far smaller
FINISHED, DIVERGED = "finished", "diverged"


def _evaluation(values: dict[str, int | float]) -> dict[str, int | float]:
    step = values.get("step")
    if type(step) is not int or step < 0:
        raise ValueError("must have a step")
    _metrics({name: value for name, value in values.items() if name != "step"})
    return values


def _metrics(values: dict[str, float]) -> dict[str, float]:
    for name, value in values.items():
        try:
            fraction = get_metric(name).fraction
        except KeyError:
            fraction = True
        # Matthews' coefficient can be −1.
        if fraction and not abs(value) <= _ONE:
            raise ValueError(f"must have {name} between −1 and 1")
    return values


def _time(value: str) -> str:
    datetime.fromisoformat(value)
    return value


# Single precision may round a metric up.
_ONE = 1 + 1e-6
_Name = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=0, le=2**63)]
_Metrics = Annotated[dict[str, float], AfterValidator(_metrics)]
_Evaluation = Annotated[dict[str, int | float], AfterValidator(_evaluation)]


@dataclass(frozen=True, config=STRICT)
class Result:
    """A run that ended. A field of another type or range raises an error.

    Attributes:
        task: name of the task.
        loss: name of the loss in the comparison; ``"teacher"`` for the teacher.
        seed: of classification head, dropout and data order.
        settings: everything that decides the outcome, by option name.
        headline: key of the main metric in ``metrics``.
        metrics: on the development rows, as fractions of one, or in the unit of the metric; empty
            for a diverged run.
        teacher_metrics: the teacher's metrics on the same rows.
        agreement: share of development rows, or positions of texts, for which student and teacher
            predict the same class; None for a diverged run.
        teacher_logits: SHA-256 of the file with the teacher's outputs on the training rows.
        rows: number of rows, by ``train`` and ``dev``.
        steps: optimiser steps; for a diverged run those before it failed.
        seconds: duration of the training steps, without loading, checkpoints and evaluation.
        precision: the precision in which the model was trained.
        versions: of otkd, torch, transformers, python.
        machine: processor, cores, device.
        majority_metrics: metrics of predicting the class most frequent in training; only in the
            teacher's result.
        evaluations: ``step`` and metrics of each evaluation during training, the last at its end.
        files: SHA-256 of the files that belong to this result, by their path beside it.
        status: ``"diverged"`` if a number was not finite.
        reason: what was not finite in a diverged run.
        finished: UTC time, ISO 8601.
    """

    task: _Name
    loss: _Name
    seed: Seed
    settings: dict[str, Any]
    headline: _Name
    metrics: _Metrics
    teacher_metrics: _Metrics
    agreement: Annotated[float, Field(ge=0, le=_ONE)] | None
    teacher_logits: str
    rows: dict[str, _Count]
    steps: _Count
    seconds: Annotated[float, Field(ge=0, le=2**63)]
    precision: Literal["fp32", "bf16"]
    versions: dict[str, str]
    machine: dict[str, Any]
    majority_metrics: _Metrics = field(default_factory=dict)
    evaluations: list[_Evaluation] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    status: Literal["finished", "diverged"] = FINISHED
    reason: str = ""
    finished: Annotated[str, AfterValidator(_time)] = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not {"train", "dev"} <= self.rows.keys():
            raise ValueError("rows must have train and dev")
        if self.diverged:
            if self.metrics or self.agreement is not None or not self.reason:
                raise ValueError("a diverged run must have a reason and no metrics")
        elif self.headline not in self.metrics or self.agreement is None:
            raise ValueError(f"a finished run must have the metric {self.headline} and agreement")
        for name, value in (("task", self.task), ("seed", self.seed)):
            if self.settings.get(name, value) != value:
                raise ValueError(f"{name} must be the same in the settings")
        return self

    @property
    def diverged(self) -> bool:
        """Whether a number of the training was not finite; there are no metrics then."""
        return self.status == DIVERGED

    @property
    def score(self) -> float:
        """The main metric; a diverged run has none (``KeyError``)."""
        return self.metrics[self.headline]

    @property
    def improvement(self) -> float:
        """A number that is larger for a better score."""
        return get_metric(self.headline).improvement(self.score)

    @property
    def seconds_per_step(self) -> float:
        """Mean duration of a training step; 0 without training."""
        return self.seconds / self.steps if self.steps else 0.0


class CorruptResultError(ValueError):
    """A file that is not a whole result, unchanged since it was written."""


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A hash of settings that does not depend on their order."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_result(path: Path, result: Result) -> None:
    """Write a result file."""
    content = {
        "schema": SCHEMA,
        "settings_hash": settings_hash(result.settings),
        **asdict(result),
        "seconds_per_step": result.seconds_per_step,
    }
    write_json(path, {**content, "content_hash": _content_hash(content)})


def read_result(path: Path) -> Result:
    """Read and check a result file.

    Raises:
        CorruptResultError: if it is not a whole result, unchanged since it was written.
        FileNotFoundError: if there is none.
    """
    try:
        content = _read_content(path)
        if content["schema"] == 1:
            content = {"majority_metrics": {}, "status": FINISHED, "reason": "", **content}
        elif content.pop("content_hash", None) != _content_hash(content):
            raise ValueError("does not match its content hash: it was changed after it was written")
        missing = [f.name for f in fields(Result) if f.name not in content]
        if missing:
            raise ValueError(f"has no {', '.join(missing)}")
        result = Result(**{f.name: content[f.name] for f in fields(Result)})
        if content.get("settings_hash") != settings_hash(result.settings):
            raise ValueError("does not match its settings hash")
    except ValidationError as error:
        mistake = first_mistake(error, lambda place: ".".join(map(str, place)))
        raise CorruptResultError(f"{path} is not a valid result: {mistake}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptResultError(f"{path} {error}") from error
    return result


def _read_content(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise ValueError("is not a file")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"is larger than {_LARGEST:,} bytes, the limit for a result")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not whole JSON ({error})") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    # The type, because true is equal to 1.
    if type(schema) is not int or schema not in (1, SCHEMA):
        raise ValueError(f"is not a result file of schema 1 or {SCHEMA}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
