"""What a training leaves on disk: the checkpoints of an unfinished run, and saved models.

The folder of an unfinished run has its settings and its checkpoints, each with the hashes of its
files: Trainer does not notice a missing random state, and would continue with another one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otkd.files import (
    PARTIAL_PREFIX,
    PARTIAL_SUFFIX,
    changed_file,
    errors_about,
    file_digest,
    file_digests,
    files_below,
    write_json,
)
from otkd.study.messages import notice
from otkd.study.ownership import WORK, check_own, mark, remove
from otkd.study.reuse import TEACHER, check_overwrite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SETTINGS = WORK[0]
_FILES = "otkd-files.json"


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save model and tokenizer for ``from_pretrained(folder)``; the folder is replaced as a whole.

    Raises:
        StudyError: if there is a folder that the command did not write.
    """
    check_own(folder)
    partial = folder.with_name(f"{PARTIAL_PREFIX}{folder.name}{PARTIAL_SUFFIX}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with errors_about(folder):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            mark(partial, (path.name for path in partial.iterdir()))
            for path in files_below(partial):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            remove(folder)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_work(work: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check that the checkpoints in ``work``, if any, are of a run with these settings.

    With ``overwrite`` others are removed. The teacher counts only if ``settings`` name one.

    Raises:
        StudyError: if they are of another run, or the command did not write them.
    """
    check_own(work)
    try:
        found = dict(json.loads((work / _SETTINGS).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        if any(work.glob("checkpoint-*")):
            notice(f"The checkpoints in {work} have no settings; the training starts again.")
        remove(work)
        return
    if TEACHER not in settings:
        found.pop(TEACHER, None)
    if found != settings:
        check_overwrite(work, found, settings, overwrite=overwrite)
        remove(work)


def claim(work: Path, settings: Mapping[str, Any]) -> Path:
    """The folder for the checkpoints of a run with these settings; those of others are removed."""
    check_work(work, settings, overwrite=True)
    mark(work, WORK)
    write_json(work / _SETTINGS, dict(settings))
    return work


def seal(checkpoint: Path) -> None:
    """Write the hashes of a checkpoint's files into it. Without them it is not resumed from."""
    files = file_digests(checkpoint, files_below(checkpoint))
    write_json(checkpoint / _FILES, {"settings": _settings(checkpoint.parent), "files": files})


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in ``folder`` with all files unchanged, or None; others are removed."""
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
        notice(f"There is no valid checkpoint in {folder}: the training starts again.")
    return None


def _fault(checkpoint: Path) -> str | None:
    try:
        content: Any = json.loads((checkpoint / _FILES).read_text(encoding="utf-8"))
        settings, files = content["settings"], dict(content["files"])
    except FileNotFoundError:
        return "is incomplete"
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
