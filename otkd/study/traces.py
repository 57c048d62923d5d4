"""What a training leaves behind: models, checkpoints, and the fields of every result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otkd.files import PARTIAL_PREFIX, PARTIAL_SUFFIX, errors_about
from otkd.study.machine import machine, versions
from otkd.study.messages import StudyError, notice
from otkd.study.ownership import WORK, check_own, mark, remove
from otkd.study.results import TEACHER, files_below, mismatch_message, write_json
from otkd.study.training import Fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.study.experiment import Experiment, Rows

_SETTINGS = WORK[0]


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save model and tokenizer so that ``from_pretrained(folder)`` loads them; whole or not.

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
    """Check that checkpoints in ``work``, if any, are of a run with these settings.

    With ``overwrite`` those of another are removed. Which teacher they had counts where
    ``settings`` name one.

    Raises:
        StudyError: if they are of another run, or the command did not write them.
    """
    check_own(work)
    try:
        found = dict(json.loads((work / _SETTINGS).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        # Nothing there, or stopped before its first step; or damaged since.
        if any(work.glob("checkpoint-*")):
            notice(f"{work} does not say what its checkpoints are of; the training begins anew.")
        remove(work)
        return
    if TEACHER not in settings:
        found.pop(TEACHER, None)
    if found == settings:
        return
    if not overwrite:
        raise StudyError(mismatch_message(work, found, settings))
    remove(work)


def claim(work: Path, settings: Mapping[str, Any]) -> Path:
    """The folder for the checkpoints of a run with these settings, those of another removed."""
    check_work(work, settings, overwrite=True)
    mark(work, WORK)
    write_json(work / _SETTINGS, dict(settings))
    return work


def common_fields(experiment: Experiment, rows: Rows, took: Fit) -> dict[str, Any]:
    """What every result says of its task, its training and its machine."""
    return {
        "task": experiment.task.name,
        "headline": experiment.task.headline,
        "rows": rows.counts(),
        "steps": took.steps,
        "seconds": took.seconds,
        "evaluations": [{"step": step, **metrics} for step, metrics in took.evaluations],
        "precision": experiment.precision.name,
        "versions": versions(),
        "machine": machine(),
    }
