"""Rows of a data set on the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from otkd.tasks.tasks import DataError


def hub_rows(name: str, split: str) -> Any:
    """A part of a data set on the Hugging Face hub; ``DataError`` if it cannot be read."""
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(name, split=split)
    except Exception as error:  # the hub, its cache and the builders have many kinds of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} is no file, and no data set of the hub could be read (part {split}): {reason}"
        ) from error
    return rows
