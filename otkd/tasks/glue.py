"""GLUE data, from a folder in its official TSV layout or from the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otkd.tasks.hub import from_hub
from otkd.tasks.tasks import DataError, Task
from otkd.tasks.tsv import read_tsv

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True)
class _Layout:
    """The format of a task's TSV files.

    ``labels`` are the spellings of the labels in the order of their ids; ``header`` is given for
    files without a header line; ``skip_short_rows`` is for files that are known to contain broken
    lines.
    """

    sentences: tuple[str, ...]
    label: str = "label"
    labels: tuple[str, ...] = ("0", "1")
    header: tuple[str, ...] | None = None
    skip_short_rows: bool = False


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

_LAYOUTS = {
    "cola": _Layout(("sentence",), header=("source", "label", "mark", "sentence")),
    "sst2": _Layout(("sentence",)),
    "mnli": _Layout(_PAIR, "gold_label", ("entailment", "neutral", "contradiction")),
    "mrpc": _Layout(("#1 String", "#2 String"), "Quality"),
    "rte": _Layout(_PAIR, labels=_ENTAILMENT),
    "qnli": _Layout(("question", "sentence"), labels=_ENTAILMENT),
    # A few questions of the official training file hold a line break, which leaves two short lines.
    # Every loader of GLUE leaves them out.
    "qqp": _Layout(("question1", "question2"), "is_duplicate", skip_short_rows=True),
    "wnli": _Layout(_PAIR),
}


def _file_name(task: Task, split: str) -> str:
    return f"{split}.tsv" if split in ("train", "dev") else f"dev_{split}.tsv"


def _task_folder(task: Task, data_dir: Path) -> Path:
    names = [_file_name(task, split) for split in ("train", *task.dev_splits)]
    expected = f"expected {data_dir / task.title} with {' and '.join(names)}"
    if not data_dir.is_dir():
        what = "is not a folder" if data_dir.exists() else "does not exist"
        raise DataError(f"The data folder {data_dir} {what}; {expected}.")
    nested = data_dir / task.title
    folder = nested if nested.is_dir() else data_dir
    missing = [name for name in names if not (folder / name).is_file()]
    if folder is data_dir and missing:
        raise DataError(f"{data_dir} holds no {task.title} in GLUE's layout; {expected}.")
    if missing:
        raise DataError(f"{folder} lacks {' and '.join(missing)}; {task.title} needs {names}.")
    return folder


def load_glue_folder(task: Task, data_dir: Path) -> dict[str, Dataset]:
    """Read a task from ``data_dir/TITLE/*.tsv``, or from ``data_dir`` if it is that folder.

    Returns:
        ``"train"`` and each of the task's development splits.

    Raises:
        DataError: for a missing folder, file or column, a row with a wrong number of fields, or an
            unknown label; the message names the file and line, and what was expected.
    """
    from datasets import Dataset

    folder = _task_folder(task, data_dir)
    layout = _LAYOUTS[task.name]
    ids = {spelling: label for label, spelling in enumerate(layout.labels)}
    splits = {}
    for split in ("train", *task.dev_splits):
        path = folder / _file_name(task, split)
        columns: dict[str, list[Any]] = {name: [] for name in (*_text_columns(task), "label")}
        for line, row in read_tsv(
            path,
            (*layout.sentences, layout.label),
            header=layout.header,
            skip_short_rows=layout.skip_short_rows,
        ):
            *texts, label = row
            if label not in ids:
                raise DataError(
                    f"{path}, line {line}: the {layout.label} is {label!r}; "
                    f"expected one of {', '.join(layout.labels)}."
                )
            for column, value in zip(columns, (*texts, ids[label]), strict=True):
                columns[column].append(value)
        if not columns["label"]:
            after = "" if layout.header else " after its header in line 1"
            raise DataError(f"{path} holds no rows{after}.")
        splits[split] = Dataset.from_dict(columns)
    return splits


def load_glue_hub(task: Task) -> dict[str, Dataset]:
    """Read a task from the Hugging Face hub.

    Returns:
        ``"train"`` and each of the task's development splits.

    Raises:
        DataError: if the hub cannot be reached and its cache does not hold the task.
    """
    loaded = from_hub(
        HUB_NAME,
        task.name,
        failure=f"{task.title} could not be loaded from the Hugging Face hub ({HUB_NAME})",
        remedy="Where the hub cannot be reached, download GLUE once and name its folder with "
        f"--data-dir DIR, which holds {task.title}/train.tsv and its development file in the "
        "official layout.",
    )
    sources = {"train": "train", "dev": "validation"}
    renamed = dict(zip(task.sentences, _text_columns(task), strict=True))
    return {
        split: loaded[sources.get(split, f"validation_{split}")]
        .select_columns([*task.sentences, "label"])
        .rename_columns(renamed)
        for split in ("train", *task.dev_splits)
    }


def _text_columns(task: Task) -> tuple[str, ...]:
    return ("text", "text_pair")[: len(task.sentences)]
