"""Names of losses and protocols that become files and folders."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from otkd.tasks import task_names

# Some file systems have a shorter limit for longer names with a suffix.
_MOST_BYTES = 100
_FORM = re.compile(r"[\w(+=]([\w +.,=%()-]*[\w+,=%()-])?")
# Files and folders of the study itself, and the devices of Windows.
_TAKEN = {"teacher", "student", "tuning", "summary.json", "comparison.png", "precision.json"}
_TAKEN |= {"results.json", "student.work"}
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)\s*(\..*)?")


def check_file_names(names: Iterable[str], where: str) -> None:
    """Check that each of ``names`` can name a file on every file system.

    Args:
        names: of losses, or of a protocol.
        where: the place of the name in the user's file, with ``{}`` for the name.

    Raises:
        ValueError: naming the first that cannot, and the reason.
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
    if not _FORM.fullmatch(unicodedata.normalize("NFC", name)):
        return (
            "a name consists of letters, digits and any of ' _-+.,=%()', begins with a letter, a "
            "digit or one of '_(+=', and does not end with a space or a dot"
        )
    if len(name.encode()) > _MOST_BYTES:
        return f"it is longer than {_MOST_BYTES} bytes"
    if _plain(name) in {*_TAKEN, *task_names()}:
        return "the command itself has files or folders of this name"
    if _DEVICE.fullmatch(_plain(name)):
        return "it is the name of a device on Windows"
    return None


def _plain(name: str) -> str:
    """A form that is equal for names that some file systems cannot tell apart."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
