"""Result files: one JSON a run, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from otkd.cli.console import CommandError
from otkd.files import written_whole

SCHEMA = 1
# Is no setting, yet a student of another teacher is of another experiment.
TEACHER = "teacher_logits"
_ABSENT = "not set"


class CorruptResultError(ValueError):
    """A result file that is cut short, edited or not a result at all."""


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        task: the task's name.
        loss: the name of the loss in the comparison; ``"teacher"`` for the teacher.
        seed: the seed of head, dropout and data order.
        settings: everything that decides the outcome, by option name.
        headline: the key in ``metrics`` that tables lead with.
        metrics: metrics on the development rows, as fractions of one.
        teacher_metrics: the teacher's metrics on the same rows.
        agreement: share of development rows on which student and teacher choose the same class.
        teacher_logits: SHA-256 of the file with the teacher's logits on the training rows.
        rows: number of rows, by ``train`` and ``dev``.
        steps: optimiser steps.
        seconds: time of the training steps, without loading, checkpoints and evaluation.
        precision: ``"fp32"`` or ``"bf16"``, as used.
        versions: of otkd, torch, transformers, python.
        machine: processor, cores, device.
        majority_metrics: what always answering the class most frequent in training scores; in the
            teacher's result alone.
        evaluations: every evaluation of the training, ``step`` and metrics; the last is at its end.
        files: SHA-256 of the files that belong to this result, by name beside it.
        finished: UTC time, ISO 8601.
    """

    task: str
    loss: str
    seed: int
    settings: dict[str, Any]
    headline: str
    metrics: dict[str, float]
    teacher_metrics: dict[str, float]
    agreement: float
    teacher_logits: str
    rows: dict[str, int]
    steps: int
    seconds: float
    precision: str
    versions: dict[str, str]
    machine: dict[str, Any]
    majority_metrics: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    finished: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    @property
    def score(self) -> float:
        """The headline number, as a fraction of one."""
        return self.metrics[self.headline]

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a training step; 0 where nothing was trained."""
        return self.seconds / self.steps if self.steps else 0.0


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A hash of settings that does not depend on their order."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def write_result(path: Path, result: Result) -> None:
    """Write a result file."""
    write_json(
        path,
        {
            "schema": SCHEMA,
            "settings_hash": settings_hash(result.settings),
            **asdict(result),
            "seconds_per_step": result.seconds_per_step,
        },
    )


def read_result(path: Path) -> Result:
    """Read and check a result file.

    Raises:
        CorruptResultError: if it is not whole JSON, lacks a field, or its hash does not fit.
        FileNotFoundError: if there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptResultError(f"{path} is not whole JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise CorruptResultError(f"{path} is not a result file of schema {SCHEMA}")
    names = [item.name for item in fields(Result)]
    # Younger than the schema, and left out by files that are older.
    content.setdefault("majority_metrics", {})
    missing = [name for name in names if name not in content]
    if missing:
        raise CorruptResultError(f"{path} lacks {', '.join(missing)}")
    result = Result(**{name: content[name] for name in names})
    try:
        hash_fits = content.get("settings_hash") == settings_hash(result.settings)
        numbers = [result.score, result.agreement, result.seconds_per_step]
        numbers_fit = all(isinstance(number, (int, float)) for number in numbers)
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptResultError(f"{path} has a field of the wrong kind ({error!r})") from error
    if not (hash_fits and numbers_fit):
        raise CorruptResultError(f"{path} does not fit its own settings hash")
    return result


def find_result(
    path: Path,
    settings: Mapping[str, Any],
    *,
    overwrite: bool = False,
    notice: Callable[[str], None],
) -> Result | None:
    """The finished result at ``path``, or None if the run is to be done.

    A corrupt file is reported through ``notice`` and counts as absent. So does, with
    ``overwrite``, one made with other settings.

    Args:
        path: of the result file.
        settings: with the precision as used, which `auto` does not tell; and ``teacher_logits``,
            where it is known which teacher a student is to have.
        overwrite: see above.
        notice: see above.

    Raises:
        CommandError: if the file was made with other settings; the message names them.
    """
    try:
        result = read_result(path)
    except FileNotFoundError:
        return None
    except CorruptResultError as error:
        notice(f"{error}; the run is done again.")
        return None
    made = {**result.settings, "precision": result.precision}
    if TEACHER in settings:
        made[TEACHER] = result.teacher_logits
    if settings_hash(made) == settings_hash(settings):
        return result
    if overwrite:
        notice(f"{path} was made with {_other(made, settings)}; the run is done again.")
        return None
    raise CommandError(mismatch_message(path, made, settings))


def mismatch_message(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say which settings differ between a file and this command, and the ways out."""
    return "\n".join(
        (
            f"{path} was made with {_other(found, wanted)}:",
            *(
                f"  {name}: {found.get(name, _ABSENT)} there, {wanted.get(name, _ABSENT)} now"
                for name in _differing(found, wanted)
            ),
            "Choose another --output-dir, or redo such runs with --overwrite.",
        )
    )


def _other(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    return "another teacher" if _differing(found, wanted) == [TEACHER] else "other settings"


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = sorted({*found, *wanted})
    return [name for name in names if found.get(name, _ABSENT) != wanted.get(name, _ABSENT)]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
