"""What the command says and how it stops: consoles, errors with a remedy, missing extras."""

from __future__ import annotations

import importlib.util

from rich.console import Console

# Results go to stdout, all else to stderr, so that a table can be piped.
out = Console()
err = Console(stderr=True)
if not out.is_terminal:
    # A file has no width to respect, and a table is not to be cut to that of a small terminal.
    out.width = max(out.width, 120)

_TRAIN_MODULES = (
    "accelerate",
    "datasets",
    "filelock",
    "matplotlib",
    "safetensors",
    "torchmetrics",
    "transformers",
)


class CommandError(Exception):
    """A mistake the user can mend; the message is all that is shown."""


def notice(message: str) -> None:
    """Say something in passing, on stderr."""
    err.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)


def require_train_extra() -> None:
    """Check that the packages of the ``train`` extra are there, without importing them.

    Raises:
        CommandError: if one is missing, with the command that installs it.
    """
    missing = [name for name in _TRAIN_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"This command needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'}"
            " not installed: pip install '.[train]' in otkd's checkout"
        )


def quiet_libraries() -> None:
    """Turn off the progress bars and advice of the libraries below; errors still show."""
    import datasets
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
