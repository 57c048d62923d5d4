"""Sentences for errors of the operating system, and the signals that end a command."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# The cause and what to do about it; elsewhere the system's own words must do.
_SENTENCES = {
    errno.ENOSPC: ("the disk is full", "Free some space on it"),
    errno.EDQUOT: ("your disk quota is used up", "Remove some of your files"),
    errno.EFBIG: (
        "the file would be larger than this process may write",
        "Raise that limit (`ulimit -f`)",
    ),
    errno.EACCES: ("permission is denied", "Check who owns it and what its mode allows"),
    errno.EPERM: ("the system does not permit it", "Check who owns it and what its mode allows"),
    errno.EROFS: ("it is on a file system that is read-only", "Choose another place"),
    errno.EISDIR: ("it is a folder where a file is expected", "Move it away"),
    errno.ENOTDIR: ("a file is where a folder is expected", "Move that file away"),
    errno.EEXIST: ("something else of that name is there", "Move it away"),
    errno.ENOTEMPTY: ("the folder is not empty", "Move its content away"),
    errno.ENOENT: (
        "there is no such file or folder, or it is a symbolic link to nothing",
        "Check the path",
    ),
    errno.ELOOP: ("its symbolic links lead in a circle", "Check the path"),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one"),
    errno.EIO: ("the device reports an error", "Check the disk"),
    errno.EMFILE: ("too many files are open", "Raise that limit (`ulimit -n`)"),
    errno.ENFILE: ("too many files are open", "Close other programs"),
}


def sentence(error: OSError) -> str:
    """Say which file the system refused, why, and what to do."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if _is_path(name)]
    cause, remedy = _SENTENCES.get(error.errno or 0, (error.strerror or str(error), ""))
    start = f"{' → '.join(names)}: {cause}" if names else f"{cause[:1].upper()}{cause[1:]}"
    return f"{start.rstrip('.')}." + (f" {remedy}, then give the command again." if remedy else "")


def _is_path(name: object) -> bool:
    return isinstance(name, (str, bytes, os.PathLike))


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end: like Ctrl-C, with another exit status."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise :class:`Interrupted` where SIGTERM or SIGHUP would end the process without a word."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # One that is ignored, as nohup has it, stays so.
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
