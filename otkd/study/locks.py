"""One command a folder: a lock of the operating system's, which ends with its process."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from otkd.study.messages import StudyError, notice

LOCK = ".otkd.lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands from writing in ``folder``, which is made, for the time of the block.

    The operating system holds the lock, so that none is left by a process that was killed. Where it
    cannot lock, as on some network file systems, a notice says so and the block runs without.

    Args:
        folder: to be written in.

    Raises:
        StudyError: if another command has it; the message names its process.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    # Read before, too: early versions of filelock empty the file in trying.
    before = _read(path)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise StudyError(
            f"{folder} is in use by another otkd command{_read(path) or before}. Wait until it has "
            "ended, or choose another place for what this one writes."
        ) from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
            raise
        notice(
            f"The file system of {folder} cannot lock files: make sure that no other otkd command "
            "writes there at the same time."
        )
        yield
        return
    try:
        now = datetime.now(timezone.utc).isoformat(sep=" ", timespec="seconds")
        _write(path, f" (process {os.getpid()} on {platform.node()}, since {now})")
        yield
    finally:
        _write(path, "")
        lock.release()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:300]
    except OSError:
        return ""


def _write(path: Path, text: str) -> None:
    # Only a message depends on it, and Windows lets nobody else write to a file that is locked.
    with suppress(OSError), path.open("r+", encoding="utf-8") as file:
        file.truncate()
        file.write(text)
