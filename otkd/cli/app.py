"""The command `otkd`: its commands and their options. Heavy imports wait until they are needed."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from otkd.cli.console import Notices, err, notice, out, require_train_extra
from otkd.cli.options import given_options, with_settings
from otkd.study.failures import Interrupted, interrupted_by_signals, sentence
from otkd.study.messages import StudyError
from otkd.study.settings import Settings
from otkd.version import __version__

app = typer.Typer(
    name="otkd",
    help="Distil classifiers with optimal-transport losses and the f-divergences beside them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OutputDir = Annotated[Path, typer.Option(help="Where results are written and looked for.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Redo runs of other settings or another teacher, and those that diverged.",
    ),
]


@contextmanager
def _reporting(output_dir: Path) -> Iterator[None]:
    """Turn mistakes, refusals of the system and signals into a message and an exit status."""
    # Imported here so that --help need not load the package's data module.
    from otkd.tasks.tasks import DataError

    handler, logger = Notices(), logging.getLogger("otkd")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(), interrupted_by_signals():
            warnings.showwarning = _show_warning
            yield
    except (StudyError, DataError) as error:
        _show_error(str(error))
        raise typer.Exit(1) from error
    except BrokenPipeError:
        raise  # whoever read the output wants no more of it
    except OSError as error:
        done = f"What is done is not lost: finished runs are kept in {output_dir}."
        _show_error(f"{sentence(error)} {done}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, Interrupted):
            name, number = f"Ended by {signal.Signals(interrupt.number).name}", interrupt.number
            kept = f"what is finished stays in {output_dir}"
        else:
            name, number = "Interrupted", signal.SIGINT
            kept = f"finished runs are kept in {output_dir}"
        _say(f"{name}: {kept}; the same command continues.")
        raise typer.Exit(128 + number) from None
    finally:
        logger.removeHandler(handler)


def _show_error(message: str) -> None:
    _say(f"Error: {message}", style="red")


def _say(message: str, style: str | None = None) -> None:
    err.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def _show_warning(message: Warning | str, *details: object) -> None:
    """Show a warning without the place in the code that Python puts before it."""
    notice(f"Warning: {message}")


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
    """Distil classifiers with optimal-transport losses and the f-divergences beside them."""


@app.command()
def losses() -> None:
    """List the losses, what each is, and their options."""
    from otkd.cli.catalogue import losses_table

    out.print(losses_table())


@app.command()
@partial(with_settings, without=["score"])  # the student that is saved is the last
def train(
    settings: Settings,
    context: typer.Context,
    loss: Annotated[str, typer.Option(help="A loss by its registry name: see `otkd losses`.")],
    seed: Annotated[int, typer.Option(help="Seed of head, dropout and data order.")] = 0,
    output_dir: OutputDir = Path("otkd-train"),
    overwrite: Overwrite = False,
) -> None:
    """Distil one student with one loss, evaluate it and save it.

    An interrupted training goes on from its last complete epoch when the command is given again.
    """
    with _reporting(output_dir):
        require_train_extra()
        from otkd.cli import commands

        given = given_options(context)
        commands.train(settings, loss, seed, output_dir, given=given, overwrite=overwrite)


@app.command()
@with_settings
def compare(
    settings: Settings,
    context: typer.Context,
    losses: Annotated[
        str,
        typer.Option(help="Names with commas between them; all of the protocol, if one is given."),
    ] = "",
    protocol: Annotated[
        str | None,
        typer.Option(
            help="author (SinKD's published protocol), fair, or a file FILE.toml of that kind: it "
            "fixes losses and settings. Options given here come before it."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Students per loss, seeds 0, 1, …: the protocol's, or 5.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that train students side by side. By default one a GPU, or without "
            "any one a core, at most 4."
        ),
    ] = None,
    output_dir: OutputDir = Path("results"),
    overwrite: Overwrite = False,
) -> None:
    """Distil a student per loss and seed and put the losses side by side.

    TASK may name several, with commas between them. Finished runs are kept: when the command is
    given again, it goes on where it stopped.
    """
    with _reporting(output_dir):
        names = [name.strip() for name in losses.split(",") if name.strip()]
        if not names and protocol is None:
            raise StudyError(
                "--losses names no loss: name some (see `otkd losses`), or a --protocol."
            )
        require_train_extra()
        from otkd.cli import commands
        from otkd.study.protocols import load_protocol

        commands.compare(
            settings,
            names,
            seeds,
            output_dir,
            protocol=load_protocol(protocol) if protocol else None,
            given=given_options(context),
            workers=workers,
            overwrite=overwrite,
        )


def main() -> None:
    """Entry point of the command `otkd`."""
    app()


if __name__ == "__main__":
    main()
