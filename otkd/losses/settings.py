"""The settings that all losses have in common, and how ``help()`` shows them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from typing_extensions import TypedDict

from otkd.scalars import as_whole


class SettingsBesideTemperature(TypedDict, total=False):
    """The common keyword arguments of every loss, except its temperature."""

    teacher_temperature: float | None
    rescale_t2: bool | None
    reduction: str
    vocab_size: int | tuple[int, int] | None


class CommonSettings(SettingsBesideTemperature, total=False):
    """The common keyword arguments of every loss; see :class:`DistillationLoss`."""

    temperature: float


class WholeSignature:
    """The signature shown by ``help()``: arguments of the base classes replace ``**common``."""

    def __get__(self, loss: object, kind: type) -> inspect.Signature:
        if loss is not None:  # the call of a loss has its own signature
            raise AttributeError("__signature__")
        own = inspect.signature(kind.__init__)
        parameters = list(own.parameters.values())[1:]
        whole = [p for p in parameters if p.kind != p.VAR_KEYWORD]
        bases = (base for base in kind.__mro__[1:] if hasattr(base, "__signature__"))
        if len(whole) < len(parameters) and (base := next(bases, None)):
            names = {p.name for p in whole}
            inherited = inspect.signature(base).parameters.values()
            whole += [p for p in inherited if p.kind == p.KEYWORD_ONLY and p.name not in names]
        return own.replace(parameters=whole)


def unknown_argument(owner: str, name: str, known: Collection[str]) -> str:
    """The message for an unknown argument of ``owner``, with the most similar known one."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
    return f"{owner} has no argument {name!r}: {hint}"


def as_pair(vocab_size: int | tuple[int, int]) -> tuple[int, int]:
    """The number of real tokens of student and teacher.

    Raises:
        ValueError: if it is neither a whole number of at least 1 nor a pair of them.
    """
    sizes = vocab_size if isinstance(vocab_size, Sequence) else (vocab_size, vocab_size)
    try:
        student, teacher = (as_whole("vocab_size", size) for size in sizes)
    except (TypeError, ValueError):
        raise ValueError(
            "vocab_size must be a whole number of at least 1, or a pair (student, teacher) of "
            f"them, got {vocab_size!r}"
        ) from None
    return student, teacher


def teacher_scale(loss: nn.Module) -> tuple[float, int | None]:
    """The temperature at which a loss reads its teacher, and the size of the teacher's vocabulary.

    A module that is not a loss of otkd is taken to divide by its attribute ``temperature``, if it
    has one.

    Returns:
        The temperature, and the number of real tokens if the loss has ``vocab_size``.

    Raises:
        ValueError: if the terms of the loss differ in one of them.
    """
    found = set()
    for module in loss.modules():
        temperature = getattr(module, "temperature", None)
        if isinstance(temperature, int | float) and getattr(module, "needs_teacher", True):
            size = getattr(module, "vocab_size", None)
            teacher = getattr(module, "teacher_temperature", None) or temperature
            found.add((float(teacher), None if size is None else as_pair(size)[1]))
    if len(found) > 1:
        raise ValueError(
            "a mixture of teachers is one of distributions at one temperature, over one "
            f"vocabulary, but the terms of {type(loss).__name__} read their teacher at "
            f"{_listed(t for t, _ in found)}, with vocab_size {_listed(v for _, v in found)}: give "
            "all terms the same teacher_temperature and vocab_size"
        )
    return found.pop() if found else (1.0, None)


def _listed(values: Iterable[object]) -> str:
    return " and ".join(sorted({str(value) for value in values}))
