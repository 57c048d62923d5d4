"""Checkpoints that are known to be whole: each lists its files with their hashes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from otkd.study.results import changed_file, file_digest, file_digests, files_below, write_json

_FILES = "otkd-files.json"
# Beside the checkpoints: what they are checkpoints of.
_SETTINGS = "settings.json"


def seal(checkpoint: Path) -> None:
    """Note the hashes of a checkpoint's files in it; without them it is not resumed from.

    Trainer does not notice that its random state is missing, and goes on with another one.
    """
    files = file_digests(checkpoint, files_below(checkpoint))
    write_json(checkpoint / _FILES, {"settings": _settings(checkpoint.parent), "files": files})


def last_whole_checkpoint(folder: Path, notice: Callable[[str], None]) -> Path | None:
    """The latest checkpoint in ``folder`` with every file as it was written, or None.

    Later ones that are not are removed; ``notice`` is told which, and why.
    """
    numbered = sorted(
        (int(number), path)
        for path in folder.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdecimal()
    )
    for _, path in reversed(numbered):
        fault = _fault(path)
        if fault is None:
            return path
        notice(f"The checkpoint {path} {fault} and is removed.")
        shutil.rmtree(path)
    if numbered:
        notice(f"No checkpoint is left in {folder}: the training begins anew.")
    return None


def _fault(checkpoint: Path) -> str | None:
    try:
        content: Any = json.loads((checkpoint / _FILES).read_text(encoding="utf-8"))
        settings, files = content["settings"], dict(content["files"])
    except FileNotFoundError:
        return "was not written to its end"
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"has a damaged {_FILES}"
    if settings != _settings(checkpoint.parent):
        return "is of a run with other settings"
    changed = changed_file(checkpoint, files)
    if changed is None:
        return None
    return f"{'has a damaged' if changed.exists() else 'lacks'} {changed.name}"


def _settings(folder: Path) -> str | None:
    path = folder / _SETTINGS
    return file_digest(path) if path.is_file() else None
