"""Which files and folders belong to the command. All others are refused before any work.

A folder that the command makes has a marker, ``.otkd.json``, that lists the command's own entries.
Entries that are not listed belong to somebody else and are neither replaced nor removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from otkd.files import PARTIAL_PREFIX, PARTIAL_SUFFIX, write_json
from otkd.study.locks import locked
from otkd.study.messages import StudyError, notice

MARKER = ".otkd.json"
_ABOUT = "Written by the command otkd. It replaces or removes what is listed here, nothing else."
_PARTIAL = f"{PARTIAL_PREFIX}*{PARTIAL_SUFFIX}"
# Early versions wrote no marker. Their files are recognised by fields that only otkd writes.
_SIGNATURES = (
    {"schema", "settings_hash", "task", "teacher_logits"},  # a result
    {"task", "headline", "interval", "teacher", "losses", "machines"},  # a summary
    {"name", "reason", "fp32_seconds", "bf16_seconds"},  # a choice of precision
    {"task", "data_digest", "teacher_weights"},  # the settings of an unfinished run
)
# The entries of the folder of an unfinished run.
WORK = ("settings.json", "checkpoint-*", "states-*.safetensors", "answers*.jsonl")


@dataclass(frozen=True)
class Claim:
    """What a command is going to write in the folder of an experiment.

    Attributes:
        folder: of the experiment; it is never removed.
        files: that the command writes there.
        folders: that it makes, replaces and removes there.
        models: folders of models that it reads, by the option that names them.
        data: folders of data that it reads, likewise.
    """

    folder: Path
    files: Collection[Path]
    folders: Collection[Path]
    models: Mapping[str, Path] = field(default_factory=dict)
    data: Mapping[str, Path] = field(default_factory=dict)

    def check(self) -> None:
        """Check that everything that would be replaced or removed was written by otkd.

        Raises:
            StudyError: naming a file or folder that was not, or that the command reads.
        """
        for option, path in {**self.models, **self.data}.items():
            if _within(path, self.folder):
                raise StudyError(
                    f"{option} {path} is in {self.folder}, where this command writes: choose "
                    "another --output-dir, or copy it elsewhere."
                )
        for option, path in self.models.items():
            if _within(self.folder, path):
                raise StudyError(
                    f"{self.folder}, where this command writes, is in the model's folder {option} "
                    f"{path}: choose another --output-dir."
                )
        known = _holds(self.folder)
        _refuse(
            [
                *(_way_complaint(self.folder, path) for path in (*self.files, *self.folders)),
                *(_file_complaint(self.folder, path, known) for path in self.files),
                *map(_folder_complaint, self.folders),
            ]
        )

    def mark(self) -> None:
        """List the files in the folder's marker."""
        for folder in {path.parent for path in (*self.files, *self.folders)}:
            for path in folder.glob(_PARTIAL):  # left by a command that was killed
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        names = {path.relative_to(self.folder).as_posix() for path in self.files}
        mark(self.folder, _holds(self.folder) | names)


@contextmanager
def held(claim: Claim) -> Iterator[None]:
    """Lock the folder of an experiment for the block and mark its files.

    Raises:
        StudyError: if another command works there, or something there is not the command's own.
    """
    claim.check()  # before the first file, which is the lock's
    with locked(claim.folder):
        claim.check()
        claim.mark()
        yield


def mark(folder: Path, holds: Iterable[str]) -> None:
    """Write the marker of a folder: the entries ``holds``, names or patterns, are our own."""
    write_json(folder / MARKER, {"about": _ABOUT, "holds": sorted(set(holds))})


def check_own(folder: Path) -> None:
    """Check that a folder does not exist, or that everything in it is our own.

    Raises:
        StudyError: naming what is not.
    """
    _refuse([_folder_complaint(folder)])


def remove(folder: Path) -> None:
    """Remove our own entries of ``folder``, and the folder if it has no others.

    Symbolic links are not followed. The marker is removed last, so that an interrupted removal can
    be repeated.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    others = _others(folder)
    for entry in list(os.scandir(folder)):
        if entry.name in others or entry.name == MARKER:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    if others:
        notice(f"{folder} is kept: otkd did not write {_listed(others)} in it.")
        return
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def _holds(folder: Path) -> set[str]:
    """What the marker of a folder lists; nothing if there is none, or it is damaged."""
    marker = folder / MARKER
    if not os.path.lexists(marker):
        return set(WORK) if _has_signature(folder / WORK[0]) else set()
    try:
        return set(map(str, _content(marker)["holds"]))
    except (KeyError, TypeError):
        return set()


def _others(folder: Path) -> list[str]:
    """The entries of a folder that the command did not write."""
    own = {*_holds(folder), _PARTIAL}
    if (folder / MARKER).is_file():
        own.add(MARKER)
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_symlink() or not any(fnmatchcase(entry.name, pattern) for pattern in own)
    )


def _way_complaint(root: Path, path: Path) -> str | None:
    """A sentence about an entry between ``root`` and ``path`` that is not a real folder."""
    for place in (root / parent for parent in path.relative_to(root).parents[:-1]):
        if place.is_symlink():
            return f"{place} is a symbolic link, and otkd writes only into real folders"
        if os.path.lexists(place) and not place.is_dir():
            return f"{place} is a file where otkd makes a folder"
    return None


def _file_complaint(root: Path, path: Path, known: Collection[str]) -> str | None:
    if not os.path.lexists(path):
        return None
    if path.is_symlink():
        return f"{path} is a symbolic link where otkd writes a file"
    if not path.is_file():
        return f"{path} is a folder or device where otkd writes a file"
    beside = [path] if path.suffix == ".json" else path.parent.glob("*.json")
    if path.relative_to(root).as_posix() in known or any(map(_has_signature, beside)):
        return None
    return f"{path} was not written by otkd"


def _folder_complaint(path: Path) -> str | None:
    if not os.path.lexists(path):
        return None
    if path.is_symlink():
        return f"{path} is a symbolic link where otkd makes a folder"
    if not path.is_dir():
        return f"{path} is a file where otkd makes a folder"
    others = _others(path)
    return f"{path} holds {_listed(others)}, not written by otkd" if others else None


def _has_signature(path: Path) -> bool:
    return any(fields <= _content(path).keys() for fields in _SIGNATURES)


def _content(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none, or it cannot be read.

    Other people have files of any kind: reading a pipe would wait for its writer.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _refuse(complaints: Iterable[str | None]) -> None:
    lines = list(dict.fromkeys(f"  {each}" for each in complaints if each))
    if len(lines) > 5:
        lines[5:] = [f"  and {len(lines) - 5} more"]
    if lines:
        raise StudyError(
            "\n".join(
                (
                    "This command would replace files that it did not write:",
                    *lines,
                    "Move them elsewhere, or choose another --output-dir.",
                )
            )
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _within(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies in it, also by way of links."""
    if not folder.exists():
        return False
    real = Path(os.path.realpath(path))
    return any(each.exists() and each.samefile(folder) for each in (real, *real.parents))
