"""Warnings that point at the caller of otkd."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

_INNER = ("otkd", "torch")  # torch's frames of a module call lie between a loss and its caller


def warn_caller(message: str, category: type[Warning]) -> None:
    """Issue a warning from the nearest stack frame outside otkd and torch.

    Python's filters recognise a warning by its place, text and category, and by default show it
    once. So the text should name the problem, but not its data.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _package(frame) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def warn_deprecated(old: str, new: str) -> None:
    """Warn the caller of otkd that the name ``old`` will be removed in favour of ``new``."""
    warn_caller(f"{old} is deprecated, use {new}", DeprecationWarning)


def deprecated_names(module: str, names: dict[str, tuple[str, object]]) -> Callable[[str], object]:
    """A module's ``__getattr__`` that still finds deprecated names, with a warning.

    Args:
        module: the name of the module.
        names: for each deprecated name its new name and the object.
    """

    def __getattr__(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new, found = names[name]
        warn_deprecated(f"{module}.{name}", new)
        return found

    return __getattr__
