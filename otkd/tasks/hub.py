"""Data sets on the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from otkd.tasks.tasks import DataError


def from_hub(*arguments: str, failure: str, remedy: str = "", **options: Any) -> Any:
    """``datasets.load_dataset(*arguments, **options)``.

    Args:
        *arguments: of the function.
        failure: what failed, the start of a message.
        remedy: its last sentence.
        **options: of the function.

    Raises:
        DataError: if the data set cannot be read.
    """
    from datasets import load_dataset

    try:
        return load_dataset(*arguments, **options)
    except Exception as error:  # the hub, its cache and the builders have many kinds of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{failure}: {reason}. {remedy}".rstrip()) from error


def hub_rows(name: str, split: str) -> Any:
    """A part of a data set on the Hugging Face hub; ``DataError`` if it cannot be read."""
    failure = f"{name} is no file, and no data set of the hub could be read (part {split})"
    return from_hub(name, split=split, failure=failure)
