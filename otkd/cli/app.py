"""The command `otkd`: its commands and their options. Slow imports wait until they are needed."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from otkd.cli.console import StepBar, notice, out, print_table, reporting, require_train_extra
from otkd.cli.options import OutputDir, Overwrite, given_options, make_settings, with_settings
from otkd.study.messages import StudyError, quiet_libraries
from otkd.version import __version__

if TYPE_CHECKING:
    from otkd.study.grid import Comparison

app = typer.Typer(
    name="otkd",
    help="Distil language models and classifiers with optimal-transport losses and divergences.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"otkd {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Distil language models and classifiers with optimal-transport losses and divergences."""


@app.command()
def losses() -> None:
    """List the losses with a description and their options."""
    from otkd.cli.catalogue import losses_table

    out.print(losses_table())


@app.command()
@partial(with_settings, without=["score"])  # the student of the last evaluation is saved
def train(
    settings: dict[str, Any],
    context: typer.Context,
    loss: Annotated[str, typer.Option(help="Name of a loss: see `otkd losses`.")],
    seed: Annotated[
        int, typer.Option(help="Seed of classification head, dropout and data order.")
    ] = 0,
    output_dir: OutputDir = Path("otkd-train"),
    overwrite: Overwrite = False,
) -> None:
    """Distil one student with one loss, evaluate it and save it.

    An interrupted training loses at most the last minutes when the command is run again.
    """
    with reporting(output_dir):
        chosen = make_settings(settings)
        require_train_extra()
        from otkd.study.grid import train

        quiet_libraries()
        given = given_options(context)
        done = train(
            chosen, loss, seed, output_dir, progress=StepBar, given=given, overwrite=overwrite
        )
        _print(done)
        student, result = output_dir / "student", output_dir / "results.json"
        notice(f"The student is in {student}, its result in {result}.")


@app.command()
@with_settings
def compare(
    settings: dict[str, Any],
    context: typer.Context,
    losses: Annotated[
        str,
        typer.Option(help="Names separated by commas. By default all losses of the protocol."),
    ] = "",
    protocol: Annotated[
        str | None,
        typer.Option(
            help="author (SinKD's published protocol), fair, or a file FILE.toml: it sets losses "
            "and settings. Options on the command line take precedence."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Students per loss, with seeds 0, 1, … By default the protocol's, or 5."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that train students in parallel. By default one per GPU or, without a "
            "GPU, one per core, at most 4."
        ),
    ] = None,
    output_dir: OutputDir = Path("results"),
    overwrite: Overwrite = False,
) -> None:
    """Distil a student per loss and seed and compare the losses.

    TASK may be several tasks separated by commas. Finished runs are kept: when the command is run
    again, it resumes.
    """
    with reporting(output_dir):
        chosen = make_settings(settings)
        names = [name.strip() for name in losses.split(",") if name.strip()]
        if not names and protocol is None:
            raise StudyError(
                "--losses names no loss: name some (see `otkd losses`), or a --protocol."
            )
        require_train_extra()
        from otkd.study.grid import compare
        from otkd.study.protocols import load_protocol

        quiet_libraries()
        comparisons = compare(
            chosen,
            names,
            seeds,
            output_dir,
            progress=StepBar,
            protocol=load_protocol(protocol) if protocol else None,
            given=given_options(context),
            workers=workers,
            overwrite=overwrite,
        )
        with closing(comparisons):
            for done in comparisons:
                _print(done)
                notice(f"Results, summary.json and comparison.png are in {done.folder}.")


@app.command()
def align(
    student: Annotated[
        str, typer.Argument(help="The student's tokenizer: a name, a folder or a tokenizer.json.")
    ],
    teacher: Annotated[str, typer.Argument(help="The teacher's tokenizer, likewise.")],
    text: Annotated[Path, typer.Option(help="A file with one text per line.")],
    normalize: Annotated[
        bool, typer.Option(help="First write each text as both tokenizers read it.")
    ] = False,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst tokens to list.")] = 20,
    output: Annotated[
        Path | None, typer.Option(help="A JSON file for the result.", dir_okay=False)
    ] = None,
) -> None:
    """Show how well two tokenizers correspond: common positions, and tokens with a counterpart."""
    with reporting(output or Path(), resumes=False):
        from otkd.cli.align import align, audit_tables

        quiet_libraries()
        found = align(student, teacher, text, normalize=normalize, worst=worst, output=output)
        for table in audit_tables(found):
            out.print(table)
        if output is not None:
            notice(f"The result is in {output}.")


def _print(done: Comparison) -> None:
    from otkd.study.report import comparison_table, explanation

    print_table(comparison_table(done.teacher, done.students))
    out.print(explanation(done.teacher, done.students), highlight=False)


def main() -> None:
    """Entry point of the command `otkd`."""
    app()


if __name__ == "__main__":
    main()
