"""Result files: one JSON a run, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from otkd.files import written_whole
from otkd.study.fields import DIVERGED, FINISHED, check_fields
from otkd.study.messages import StudyError

# Files of schema 1 have no hash of their whole content, and none of them is of a diverged run.
SCHEMA = 2
_SCHEMAS = (1, SCHEMA)
_CONTENT_HASH = "content_hash"
_LARGEST = 64 * 2**20  # bytes; a result with an evaluation at every step is far smaller
# Is no setting, yet a student of another teacher is of another experiment.
TEACHER = "teacher_logits"
_ABSENT = "not set"


class CorruptResultError(ValueError):
    """A result file that is cut short, edited or not a result at all."""


@dataclass(frozen=True)
class Result:
    """One run that came to its end.

    Attributes:
        task: the task's name.
        loss: the name of the loss in the comparison; ``"teacher"`` for the teacher.
        seed: the seed of head, dropout and data order.
        settings: everything that decides the outcome, by option name.
        headline: the key in ``metrics`` that tables lead with.
        metrics: metrics on the development rows, as fractions of one; none of a diverged run.
        teacher_metrics: the teacher's metrics on the same rows.
        agreement: share of development rows on which student and teacher choose the same class;
            None for a diverged run.
        teacher_logits: SHA-256 of the file with the teacher's logits on the training rows.
        rows: number of rows, by ``train`` and ``dev``.
        steps: optimiser steps; of a diverged run those before it failed.
        seconds: time of the training steps, without loading, checkpoints and evaluation.
        precision: ``"fp32"`` or ``"bf16"``, as used.
        versions: of otkd, torch, transformers, python.
        machine: processor, cores, device.
        majority_metrics: what always answering the class most frequent in training scores; in the
            teacher's result alone.
        evaluations: every evaluation of the training, ``step`` and metrics; the last is at its end.
        files: SHA-256 of the files that belong to this result, by name beside it.
        status: ``"finished"``, or ``"diverged"`` if the training gave numbers that are not finite.
        reason: what was not finite, in a diverged run.
        finished: UTC time, ISO 8601.
    """

    task: str
    loss: str
    seed: int
    settings: dict[str, Any]
    headline: str
    metrics: dict[str, float]
    teacher_metrics: dict[str, float]
    agreement: float | None
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
    status: str = FINISHED
    reason: str = ""
    finished: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    @property
    def diverged(self) -> bool:
        """Whether the training gave numbers that are not finite, so that there are no metrics."""
        return self.status == DIVERGED

    @property
    def score(self) -> float:
        """The headline number, as a fraction of one.

        Raises:
            KeyError: for a diverged run.
        """
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
    """Write a result file.

    Raises:
        ValueError: if a field cannot be meant, so that the file could not be read again.
    """
    content = {
        "schema": SCHEMA,
        "settings_hash": settings_hash(result.settings),
        **asdict(result),
        "seconds_per_step": result.seconds_per_step,
    }
    check_fields(content)
    write_json(path, {**content, _CONTENT_HASH: _content_hash(content)})


def read_result(path: Path) -> Result:
    """Read and check a result file.

    Raises:
        CorruptResultError: if it is anything but a whole result as it was written.
        FileNotFoundError: if there is none.
    """
    try:
        content = _read_content(path)
        # Younger than the schema, and left out by files that are older.
        younger = {"majority_metrics": {}, "status": FINISHED, "reason": ""}
        if content["schema"] != SCHEMA:
            content = {**younger, **content}
        elif content.pop(_CONTENT_HASH, None) != _content_hash(content):
            raise ValueError("does not fit its content hash: it was changed after it was written")
        check_fields(content)
        if content.get("settings_hash") != settings_hash(content["settings"]):
            raise ValueError("does not fit its own settings hash")
    except (ValueError, RecursionError) as error:
        raise CorruptResultError(f"{path} {error}") from error
    return Result(**{item.name: content[item.name] for item in fields(Result)})


def _read_content(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise ValueError("is not a file")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"is larger than {_LARGEST:,} bytes, which no result is")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not whole JSON ({error})") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    # Not true, which is equal to 1.
    if type(schema) is not int or schema not in _SCHEMAS:
        raise ValueError(f"is not a result file of schema {' or '.join(map(str, _SCHEMAS))}")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is there twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_result(
    path: Path,
    settings: Mapping[str, Any],
    *,
    loss: str,
    overwrite: bool = False,
    notice: Callable[[str], None],
) -> Result | None:
    """The result of a run at ``path``, or None if the run is to be done.

    A corrupt file is reported through ``notice`` and counts as absent. So does one of another loss
    that was put here, and, with ``overwrite``, one made with other settings.

    Args:
        path: of the result file.
        settings: with the precision as used, which `auto` does not tell; and ``teacher_logits``,
            where it is known which teacher a student is to have.
        loss: the loss's name in the comparison.
        overwrite: see above.
        notice: see above.

    Raises:
        StudyError: if the file was made with other settings; the message names them.
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
    if settings_hash(made) != settings_hash(settings):
        if overwrite:
            notice(f"{path} was made with {_other(made, settings)}; the run is done again.")
            return None
        raise StudyError(mismatch_message(path, made, settings))
    if result.loss != loss:
        notice(f"{path} says that it is of {result.loss}, not of {loss}; the run is done again.")
        return None
    return result


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


def file_digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by their name in ``folder``, as a result in that folder keeps them."""
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(paths)}


def changed_file(folder: Path, digests: Mapping[str, str]) -> Path | None:
    """The first file that is no longer as it was when :func:`file_digests` read it, if any."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            return path
    return None


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder and the folders in it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
