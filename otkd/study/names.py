"""Names that become files and folders, checked once."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from otkd.tasks.tasks import task_names

# Longer ones, with what is put behind them, some file system does not take.
_MOST_BYTES = 100
_PUNCTUATION = " _-+.,=%()"
# What the command itself calls files and folders, where a loss or a protocol has its folder.
_TAKEN = ("teacher", "student", "tuning", "summary.json", "comparison.png", "precision.json")
_TAKEN += ("results.json", "student.work")
# What Windows does not take, whatever the suffix.
_DEVICES = (
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
)


def check_file_names(names: Iterable[str], where: str) -> None:
    """Check that a file or folder can be called by each of ``names``, on every file system.

    Args:
        names: of losses, or of a protocol.
        where: what says them, with ``{}`` in the place of the name.

    Raises:
        ValueError: naming the first that cannot be, and why.
    """
    seen: dict[str, str] = {}
    for name in names:
        reason = _reason(name)
        if reason is None and (before := seen.setdefault(_plain(name), name)) != name:
            reason = f"some file systems cannot tell it from {before!r}"
        if reason is not None:
            shown = name if len(name) <= 40 else f"{name[:40]}…"
            raise ValueError(
                f"{where.format(ascii(shown))} cannot be the name of a folder of results: {reason}"
            )


def _reason(name: str) -> str | None:
    plain = _plain(name)
    strange = [
        c for c in name if not (c.isalnum() or c in _PUNCTUATION or unicodedata.combining(c))
    ]
    if not name.strip():
        return "it is empty"
    if strange:
        return (
            f"it holds {strange[0]!a}; letters, digits and any of {_PUNCTUATION[1:]!r} are allowed"
        )
    if not (name[0].isalnum() or name[0] in "_(+="):
        return f"it begins with {name[0]!a}"
    if name[-1] in " .":
        return f"it ends with {name[-1]!a}"
    if len(name.encode()) > _MOST_BYTES:
        return f"it is longer than {_MOST_BYTES} bytes"
    if plain in (*_TAKEN, *task_names()):
        return "the command has files or folders of that name itself"
    if plain.split(".")[0].strip() in _DEVICES:
        return "on Windows a device is called that"
    return None


def _plain(name: str) -> str:
    """The same for names that some file systems cannot tell apart."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
