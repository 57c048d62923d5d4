"""At most one command per folder, by a lock that the operating system releases with the process."""

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
    """Lock ``folder``, which is made if necessary, for the duration of the block.

    Some network file systems have no locks. There a notice says so and the block runs unlocked.

    Raises:
        StudyError: if another command has the lock; the message names its process.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    holder = _read(path)  # before the attempt: early versions of filelock empty the file
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise StudyError(
            f"{folder} is in use by another otkd command{_read(path) or holder}. Wait until it has "
            "ended, or choose another --output-dir."
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
    # Only a message depends on it, and Windows does not allow writing to a locked file.
    with suppress(OSError), path.open("r+", encoding="utf-8") as file:
        file.truncate()
        file.write(text)
