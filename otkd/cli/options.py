"""The options of a command, made from the fields of a study's settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import typer

from otkd.study.settings import Settings


def given_options(context: typer.Context) -> set[str]:
    """The names of the options that the user gave, other than by leaving them at their default."""
    by_default = ("DEFAULT", "DEFAULT_MAP")
    return {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name not in by_default
    }


def with_settings(
    command: Callable[..., None], *, without: Collection[str] = ()
) -> Callable[..., None]:
    """Give ``command(settings, **own)`` the options of :class:`Settings` besides its own.

    Typer builds the command line from a signature, so one is put together here; each option stays
    written down once however many commands have it. Those of ``without`` keep their default.
    """
    names = [item.name for item in fields(Settings) if item.name not in without]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(Settings(**{name: values.pop(name) for name in names}), **values)

    hints = get_type_hints(Settings, include_extras=True)
    shared = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[item.name],
            default=inspect.Parameter.empty if item.default is MISSING else item.default,
        )
        for item in fields(Settings)
        if item.name in names
    ]
    own_hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[parameter.name])
        for parameter in list(inspect.signature(command).parameters.values())[1:]
    ]
    parameters = [shared[0], *own, *shared[1:]]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # type: ignore[attr-defined]
    return run
