"""Warnings that point at the caller of otkd."""

from __future__ import annotations

import sys
import warnings

_INNER = ("otkd", "torch")  # the frames of a module's call lie between a loss and its caller


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn as :func:`warnings.warn` does, from the nearest frame outside otkd and torch.

    Python's filters know a warning by its place, text and category, and show it by default once.
    So the text should name the problem, not what it happened to hold.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _package(frame) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
