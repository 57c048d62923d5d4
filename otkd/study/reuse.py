"""Whether a result of an earlier command is one of the run that is wanted now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from otkd.study.messages import StudyError, notice
from otkd.study.results import CorruptResultError, Result, read_result, settings_hash

# Not a setting, but a student of another teacher belongs to another experiment.
TEACHER = "teacher_logits"


def find_result(
    path: Path, settings: Mapping[str, Any], *, loss: str, overwrite: bool = False
) -> Result | None:
    """The result of a run at ``path``, or None if the run is to be done.

    A notice says why a file is not used: it is damaged, of another loss, or, with ``overwrite``, of
    other settings.

    Args:
        path: of the result file.
        settings: with the precision in use instead of ``auto``, and with ``teacher_logits`` if
            the teacher of the student is known.
        loss: name of the loss in the comparison.
        overwrite: repeat a run with other settings instead of raising an error.

    Raises:
        StudyError: if the file is of other settings; the message names them.
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
        check_overwrite(path, made, settings, overwrite=overwrite)
        return None
    if result.loss != loss:
        notice(f"{path} is a result of {result.loss}, not of {loss}; the run is done again.")
        return None
    return result


def differing_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """A line of a message for each setting that differs, by its name."""
    pairs = {
        name: (found.get(name, "not set"), wanted.get(name, "not set"))
        for name in sorted({*found, *wanted})
    }
    return {
        name: f"  {name}: {there} there, {now} now"
        for name, (there, now) in pairs.items()
        if there != now
    }


def check_overwrite(
    path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], *, overwrite: bool
) -> None:
    """Check that a run with settings ``found`` may be replaced by one with settings ``wanted``.

    Raises:
        StudyError: naming the settings that differ, unless ``overwrite`` is true.
    """
    differing = differing_settings(found, wanted)
    other = "another teacher" if [*differing] == [TEACHER] else "other settings"
    if overwrite:
        notice(f"{path} was made with {other}; the run is done again.")
        return
    raise StudyError(
        "\n".join(
            (
                f"{path} was made with {other}:",
                *differing.values(),
                "Choose another --output-dir, or repeat such runs with --overwrite.",
            )
        )
    )
