"""Pydantic's validation errors as sentences: the field, what it must be, and what it is."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from otkd.study.messages import StudyError

_SHORTER = {
    "Input should": "must",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "Value error, ": "",
}


def first_mistake(error: ValidationError, spelling: Callable[[Sequence[int | str]], str]) -> str:
    """A sentence about the first mistake.

    Args:
        error: from pydantic.
        spelling: how the user wrote the field at a given place.
    """
    mistake = error.errors()[0]
    name, message = spelling(mistake["loc"]), mistake["msg"]
    for library, ours in _SHORTER.items():
        message = message.replace(library, ours, 1)
    if mistake["type"] == "missing":
        return f"{name} is missing"
    if mistake["type"] == "value_error":
        return f"{name} {message}".strip()
    return f"{name} {message}, got {_shown(mistake['input'])}"


def checked(kind: Any, value: Any, name: str) -> Any:
    """``value`` if it is of the annotated type ``kind``.

    Raises:
        StudyError: otherwise; ``name`` is the option in the message.
    """
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        raise StudyError(f"{first_mistake(error, lambda place: name)}.") from error


def _shown(value: Any) -> str:
    """A value in one short line, however large or nested it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        return f"a number of {value.bit_length():,} bits"
