"""The options of a command, made from the fields of a study's settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer
from pydantic import ValidationError

from otkd.study.messages import StudyError
from otkd.study.settings import Settings, option
from otkd.study.validation import first_mistake
from otkd.tasks.tasks import LANGUAGE_DEFAULTS

_FLAGS = {"author": ["--author/--sound"]}
_TASK = Annotated[
    str,
    typer.Argument(
        help="A GLUE task (cola, sst2, …), rotten-tomatoes, or for language models reviews, text "
        "or instructions."
    ),
]
_FIELDS = Settings.__pydantic_fields__  # pyright: ignore[reportAttributeAccessIssue]


def make_settings(values: dict[str, Any]) -> Settings:
    """Settings from the command line.

    Raises:
        StudyError: naming an option whose value is not valid.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        mistake = first_mistake(error, lambda place: option(str(place[0])))
        raise StudyError(f"{mistake}.") from error


def given_options(context: typer.Context) -> set[str]:
    """The names of the options that the user gave."""
    by_default = ("DEFAULT", "DEFAULT_MAP")
    return {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name not in by_default
    }


def with_settings(
    command: Callable[..., None], *, without: Collection[str] = ()
) -> Callable[..., None]:
    """Give ``command(settings, **own)`` the options of :class:`Settings` beside its own.

    Typer reads the options from a signature, so this makes one from the fields. The command gets
    the values of the options as a dictionary. Those of ``without`` keep their default.
    """
    names = [name for name in _FIELDS if name not in without]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command({name: values.pop(name) for name in names}, **values)

    own_hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[name])
        for name, parameter in list(inspect.signature(command).parameters.items())[1:]
    ]
    task, *shared = map(_parameter, names)
    parameters = [task, *own, *shared]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # type: ignore[attr-defined]
    return run


def _parameter(name: str) -> inspect.Parameter:
    field = _FIELDS[name]
    if name == "task":
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=_TASK)
    # Choices are checked by the settings, like ranges, so that all errors read the same.
    kind = str if get_origin(field.annotation) is Literal else field.annotation
    panel = field.json_schema_extra["panel"]
    text = field.description
    if name in LANGUAGE_DEFAULTS:
        usual = LANGUAGE_DEFAULTS[name]
        if isinstance(usual, bool):
            usual = option(name if usual else f"no_{name}")
        text += f" Language models: {usual}."
    described = typer.Option(*_FLAGS.get(name, ()), help=text, rich_help_panel=panel)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=Annotated[kind, described],
    )


OutputDir = Annotated[Path, typer.Option(help="Folder of the results.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Repeat runs with other settings or another teacher, and those that diverged.",
    ),
]
