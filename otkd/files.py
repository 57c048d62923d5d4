"""Atomic writes, and errors that name the file."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The name of an unfinished file. It is short, so that paths do not become too long.
PARTIAL_PREFIX, PARTIAL_SUFFIX = ".otkd-", ".partial"


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Context with a new file beside ``path`` to write to, which replaces ``path`` at the end.

    A reader sees either the old or the new file, even if the machine stops in between. If the block
    raises, ``path`` is unchanged. Missing folders are created.

    Raises:
        OSError: if the file cannot be written; its ``filename`` is ``path``.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL_PREFIX}{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    with errors_about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Exclusive, so that no existing file is opened; with the user's usual mode.
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
    """Turn errors of a failed write into an ``OSError`` whose ``filename`` is ``path``.

    Python's own error has no file name if a write fails, safetensors and ``torch.save`` raise other
    errors, and the name of a temporary file would not help a user.
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
    """The system's error number behind an error of a library that writes files itself."""
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", text)):
        return int(found[1])
    if isinstance(error, RuntimeError) and ("unexpected pos" in text or "StreamWriter" in text):
        # torch.save does not keep the number, so look for the likely causes.
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
