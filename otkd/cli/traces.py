"""What a training leaves behind: models, checkpoints, and the fields of every result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otkd.cli.console import CommandError
from otkd.cli.machine import machine, versions
from otkd.cli.results import TEACHER, mismatch_message, write_json
from otkd.cli.training import Fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.cli.experiment import Experiment, Rows


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save model and tokenizer so that ``from_pretrained(folder)`` loads them; whole or not."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def check_work(work: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check that checkpoints in ``work``, if any, are of a run with these settings.

    With ``overwrite`` those of another are removed. Which teacher they had counts where
    ``settings`` name one.

    Raises:
        CommandError: if they are of another run.
    """
    try:
        found = json.loads((work / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Nothing there, or stopped before its first step.
        shutil.rmtree(work, ignore_errors=True)
        return
    if TEACHER not in settings:
        found.pop(TEACHER, None)
    if found == settings:
        return
    if not overwrite:
        raise CommandError(mismatch_message(work, found, settings))
    shutil.rmtree(work)


def claim(work: Path, settings: Mapping[str, Any]) -> Path:
    """The folder for the checkpoints of a run with these settings, those of another removed."""
    check_work(work, settings, overwrite=True)
    write_json(work / "settings.json", dict(settings))
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
