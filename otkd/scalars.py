"""Checks of settings: plain numbers and flags."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def as_number(name: str, value: Any) -> int | float:
    """A setting as a plain number, from a Python number or a scalar of numpy or torch.

    Raises:
        TypeError: for anything else: a bool, text, a tensor with several entries, or one that
            requires a gradient, which a setting cannot propagate.
    """
    if type(value) in (int, float):
        return value
    if getattr(value, "requires_grad", False):
        raise TypeError(
            f"{name} must be a number, got a tensor that requires a gradient: a setting is a "
            "constant and would not be trained"
        )
    scalar = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(scalar, bool) or not isinstance(scalar, Real):
        raise TypeError(f"{name} must be a number, got {_described(value)}")
    return scalar if isinstance(scalar, int | float) else float(scalar)


def as_positive(name: str, value: Any) -> int | float:
    """:func:`as_number`, raising ``ValueError`` unless it is finite and above 0."""
    number = as_number(name, value)
    if not (_is_finite(number) and number > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return number


def as_not_negative(name: str, value: Any) -> int | float:
    """:func:`as_number`, raising ``ValueError`` unless it is finite and at least 0."""
    number = as_number(name, value)
    if not (_is_finite(number) and number >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return number


def as_whole(name: str, value: Any, *, least: int = 1) -> int:
    """A setting as a plain whole number of at least ``least``.

    Raises:
        TypeError: if it is not a number, or a fraction.
        ValueError: if it is less.
    """
    number = as_number(name, value)
    if not isinstance(number, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return number


def as_flag(name: str, value: Any) -> bool:
    """A setting as True or False; ``TypeError`` for anything else, including 0 and 1."""
    scalar = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(scalar, bool):
        raise TypeError(f"{name} must be True or False, got {_described(value)}")
    return scalar


def settle(frozen: object, **values: object) -> None:
    """Replace fields of a frozen dataclass by their checked values, in its ``__post_init__``."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that is too large for float64
        return False


def _described(value: object) -> str:
    shape = getattr(value, "shape", None)
    return repr(value) if not shape else f"{type(value).__name__} of shape {tuple(shape)}"
