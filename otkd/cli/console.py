"""What the command says and how it stops: consoles, errors with a remedy, missing extras."""

from __future__ import annotations

import importlib.util
import logging

from rich.console import Console

from otkd.study.messages import StudyError

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


class Notices(logging.Handler):
    """Shows what the package logs, without a prefix, beside the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of a record."""
        notice(record.getMessage())


def notice(message: str) -> None:
    """Say something in passing, on stderr."""
    err.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)


def require_train_extra() -> None:
    """Check that the packages of the ``train`` extra are there, without importing them.

    Raises:
        StudyError: if one is missing, with the command that installs it.
    """
    missing = [name for name in _TRAIN_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise StudyError(
            f"This command needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'}"
            " not installed: pip install '.[train]' in otkd's checkout"
        )
