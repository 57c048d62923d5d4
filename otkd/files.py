"""Writing files: whole or not at all, and errors that name the file."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The name of a file that is not whole yet. It is short, so that no path becomes too long by it.
PARTIAL_PREFIX, PARTIAL_SUFFIX = ".otkd-", ".partial"


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Give a new file beside ``path`` to write to; it takes the place of ``path`` at the end.

    A reader sees the old file or the new one, never a part, even if the machine stops in between.
    If the block raises, ``path`` stays as it was. Missing folders are made.

    Raises:
        OSError: if the file cannot be written; its ``filename`` is ``path``, whatever wrote it.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL_PREFIX}{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    with errors_about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Exclusive: it is a new file, whatever else there is, with the user's usual mode.
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def errors_about(path: str | os.PathLike) -> Iterator[None]:
    """Turn the errors of failed writing into an ``OSError`` whose ``filename`` is ``path``.

    Python's own error has no name when a write fails, safetensors and ``torch.save`` raise errors
    of their own, and the name of a temporary file would tell a user nothing.
    """
    try:
        yield
    except OSError as error:
        name = os.path.basename(os.fsdecode(error.filename)) if _is_path(error.filename) else None
        if error.errno is not None and (
            error.filename is None or (name is not None and name.startswith(PARTIAL_PREFIX))
        ):
            error.filename, error.filename2 = os.fspath(path), None
        raise
    except Exception as error:
        number = _error_number(error, Path(path))
        if number is None:
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _is_path(name: object) -> bool:
    return isinstance(name, (str, bytes))


def _error_number(error: Exception, path: Path) -> int | None:
    """The number of the system's error behind one of a library that writes files by itself."""
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", text)):
        return int(found[1])
    if isinstance(error, RuntimeError) and ("unexpected pos" in text or "StreamWriter" in text):
        # torch.save keeps no number, so the likely causes are looked at.
        return _likely_cause(path)
    return None


def _likely_cause(path: Path) -> int:
    folder = next((each for each in (path, *path.parents) if each.is_dir()), None)
    if folder is not None and hasattr(os, "statvfs"):
        room = os.statvfs(folder)
        if room.f_bavail * room.f_frsize < 1 << 20:
            return errno.ENOSPC
    try:
        import resource
    except ImportError:
        return errno.EIO
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return errno.EIO if limit == resource.RLIM_INFINITY else errno.EFBIG
