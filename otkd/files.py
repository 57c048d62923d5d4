"""Writing files atomically, comparing them by hash, and errors that name the file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
def folder_written_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """Context with a new folder beside ``folder`` to write to, which is renamed to it at the end.

    A reader sees either the complete folder or none. Of several processes that write it at once,
    the first that ends provides the folder, and those of the others are discarded.

    Raises:
        OSError: if the folder cannot be written; its ``filename`` is ``folder``.
    """
    folder = Path(folder)
    partial = folder.with_name(f"{PARTIAL_PREFIX}{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    with errors_about(folder):
        try:
            partial.mkdir(parents=True)
            yield partial
            for path in files_below(partial):
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path | None:
    """The folder for files that can be computed again.

    It is ``cache_dir``, else ``$OTKD_CACHE``, else ``~/.cache/otkd``; None if neither of the first
    two is given and the user has no home folder.
    """
    try:
        return Path(cache_dir or os.environ.get("OTKD_CACHE") or "~/.cache/otkd").expanduser()
    except RuntimeError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files, by their path relative to ``folder``."""
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(paths)}


def changed_file(folder: Path, digests: Mapping[str, str]) -> Path | None:
    """The first file that differs from its hash in :func:`file_digests`, if any."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            return path
    return None


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder and its subfolders."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def errors_about(path: str | os.PathLike) -> Iterator[None]:
    """Turn errors of a failed write into an ``OSError`` whose ``filename`` is ``path``.

    Python's own error has no file name if a write fails, safetensors and ``torch.save`` raise other
    errors, and the name of a temporary file would not help a user.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        temporary = isinstance(name, (str, bytes)) and os.path.basename(
            os.fsdecode(name)
        ).startswith(PARTIAL_PREFIX)
        if error.errno is not None and (name is None or temporary):
            error.filename, error.filename2 = os.fspath(path), None
        raise
    except Exception as error:
        number = _error_number(error, Path(path))
        if number is None:
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _error_number(error: Exception, path: Path) -> int | None:
    """The number of the system's error behind one of a library that writes files itself."""
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", text)):
        return int(found[1])
    if isinstance(error, RuntimeError) and ("unexpected pos" in text or "StreamWriter" in text):
        # torch.save does not report the number, so this checks the likely causes.
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


_REMEDIES = {
    errno.ENOSPC: "Free some space on the disk",
    errno.EDQUOT: "Remove some of your files",
    errno.EFBIG: "Raise the limit of a file's size (`ulimit -f`)",
    errno.EACCES: "Check its owner and permissions",
    errno.EPERM: "Check its owner and permissions",
    errno.EROFS: "Choose another place",
    errno.EISDIR: "Move that folder elsewhere",
    errno.ENOTDIR: "Move the file in the path elsewhere",
    errno.EEXIST: "Move what has this name elsewhere",
    errno.ENOTEMPTY: "Move the folder's content elsewhere",
    errno.ENOENT: "Check the path, which may be a symbolic link to nothing",
    errno.ELOOP: "Check the path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EIO: "Check the disk",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "Close other programs",
}


def sentence(error: OSError) -> str:
    """A sentence with the file, the system's reason and, if there is a usual one, the remedy."""
    names = [
        os.fsdecode(name)
        for name in (error.filename, error.filename2)
        if isinstance(name, (str, bytes, os.PathLike))
    ]
    reason = (error.strerror or str(error)).rstrip(".")
    start = f"{' → '.join(names)}: {reason}." if names else f"{reason[:1].upper()}{reason[1:]}."
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{start} {remedy}, then run the command again." if remedy else start
