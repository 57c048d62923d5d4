"""Protocols: files that fix the settings, the losses and the tuning of a comparison."""

from __future__ import annotations

import dataclasses
import stat
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from otkd.checks import did_you_mean
from otkd.study.failures import sentence
from otkd.study.messages import StudyError
from otkd.study.names import check_file_names
from otkd.study.ranges import shown
from otkd.study.settings import RANGES, Settings
from otkd.tasks.tasks import get_task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

# In a checkout the protocols are an example to read; a wheel carries them beside this module.
_FOLDERS = (
    Path(__file__).with_name("protocols"),
    Path(__file__).parents[2] / "examples" / "glue" / "protocols",
)
_MOST_BYTES = 1_000_000
_FOR_REPORTS = ("title", "curves")
# What the tables of a file may have, and of which kind.
_SETTINGS = get_type_hints(Settings)
_SHARED = {name: kind for name, kind in _SETTINGS.items() if name not in ("task", "data_dir")}
# What one loss may have for itself; all else, data and teacher among it, all losses share.
_TUNED = {
    name: _SETTINGS[name]
    for name in (
        *("epochs", "batch_size", "learning_rate", "temperature", "anneal", "rescale_t2", "alpha"),
        *("sinkhorn_weight", "epsilon", "author", "batch_cost", "batch_temperature", "debias"),
        *("iterations", "sample_cost"),
    )
}
_OF_A_LOSS = {"loss": str, "title": str, "curves": list, "candidates": list, **_TUNED}
_OF_TUNING = {"train_rows": int, "held_out": float, **_TUNED}
_OF_THE_FILE = {"title": str, "seeds": int} | dict.fromkeys(
    ("settings", "tasks", "losses", "tuning"), dict
)
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "a table",
}


@dataclass(frozen=True)
class Objective:
    """A loss with all settings of its training, under the name it has in tables and files.

    Attributes:
        name: the name of its results.
        loss: a registry name.
        settings: of its training.
        candidates: settings to choose from by tuning, each replacing some of ``settings``.
    """

    name: str
    loss: str
    settings: Settings
    candidates: tuple[Mapping[str, Any], ...] = ()

    def tried(self, **settings: Any) -> list[Objective]:
        """One objective for each candidate, or this one if there are none.

        Args:
            **settings: that all of them have where the candidate has none.
        """
        return [self.with_settings(**{**settings, **own}) for own in self.candidates] or [self]

    def with_settings(self, **changes: Any) -> Objective:
        """The same loss with other settings, and nothing left to tune."""
        settings = dataclasses.replace(self.settings, **changes)
        return dataclasses.replace(self, settings=settings, candidates=())


@dataclass(frozen=True)
class Tuning:
    """How the candidates of a loss are compared: on rows that are not development rows.

    Attributes:
        train_rows: rows each candidate is trained on.
        held_out: share of the training rows that scores them.
        settings: of these trainings alone, replacing those of the loss; what a candidate sets comes
            first. Fewer rows may want a higher learning rate.
    """

    train_rows: int
    held_out: float
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.train_rows < 1 or not 0 < self.held_out < 1:
            raise ValueError("train_rows must be at least 1 and held_out between 0 and 1")

    def without(self, given: Collection[str]) -> Tuning:
        """The same tuning where the user gave some settings, which come before its own."""
        return dataclasses.replace(self, settings=_without(self.settings, given))


@dataclass(frozen=True)
class Protocol:
    """What a protocol file says, checked.

    Attributes:
        name: the file's name without its suffix, under which results are kept.
        title: one line for tables.
        seeds: students per loss.
        settings: of all tasks, by field of :class:`~otkd.study.settings.Settings`.
        tasks: of each task.
        losses: of each loss, by name; among them ``loss``, ``title``, ``candidates``, and
            ``curves``, the settings over which it is a point of a curve.
        tuning: how candidates are compared; None where there are none.
    """

    name: str
    title: str
    seeds: int
    settings: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    losses: Mapping[str, Mapping[str, Any]]
    tuning: Tuning | None = None

    def resolve(self, settings: Settings, given: Collection[str]) -> Settings:
        """The settings shared by all losses of ``settings.task``.

        Args:
            settings: of the command line.
            given: the fields the user gave there, which come before those of the protocol.
        """
        task = get_task(settings.task).name
        values = {**self.settings, **self.tasks.get(task, {})}
        return dataclasses.replace(settings, **_without(values, given))

    def objectives(
        self, settings: Settings, given: Collection[str], names: Iterable[str] = ()
    ) -> list[Objective]:
        """The losses ``names``, or all of the protocol, with their settings.

        Args:
            settings: from :meth:`resolve`.
            given: see :meth:`resolve`.
            names: keys of ``losses``.

        Raises:
            StudyError: for a name the protocol does not have.
        """
        chosen = list(names) or list(self.losses)
        unknown = [name for name in chosen if name not in self.losses]
        if unknown:
            raise StudyError(
                f"The protocol {self.name!r} has no loss {unknown[0]!r}"
                f"{did_you_mean(unknown[0], self.losses)} It has {', '.join(self.losses)}."
            )
        objectives = []
        for name in chosen:
            values = _without(self.losses[name], (*given, *_FOR_REPORTS))
            loss, candidates = values.pop("loss", name), values.pop("candidates", ())
            own = dataclasses.replace(settings, **values)
            objectives.append(Objective(name, loss, own, _left(candidates, given)))
        return objectives


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _left(
    candidates: Iterable[Mapping[str, Any]], given: Collection[str]
) -> tuple[Mapping[str, Any], ...]:
    """What is left to choose from where the user gave some settings: each of the rest once."""
    left: list[Mapping[str, Any]] = []
    for candidate in candidates:
        rest = _without(candidate, given)
        if rest not in left:
            left.append(rest)
    return tuple(left) if any(left) else ()


def load_protocol(name: str) -> Protocol:
    """Read a protocol by its name (``author``, ``fair``) or from a file ``*.toml``.

    Raises:
        StudyError: if there is none, or it says something that cannot be meant.
    """
    path = _find(name)
    try:
        check_file_names([path.stem], "its name, {},")
        return _parse(path.stem, tomllib.loads(_read(path)))
    except OSError as error:
        raise StudyError(f"The protocol cannot be read. {sentence(error)}") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"The protocol {path} is not UTF-8 text: {error}.") from error
    except RecursionError as error:
        raise StudyError(f"The protocol {path} nests tables or lists too deeply.") from error
    except ValueError as error:
        raise StudyError(f"The protocol {path}: {error}") from error


def _read(path: Path) -> str:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("it is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > _MOST_BYTES:
        raise ValueError(
            f"it has {status.st_size:,} bytes, and no protocol needs more than {_MOST_BYTES:,}"
        )
    return path.read_text(encoding="utf-8-sig")


def _find(name: str) -> Path:
    if name.endswith(".toml"):
        return Path(name)
    protocols = _shipped()
    if name in protocols:
        return protocols[name]
    raise StudyError(
        f"There is no protocol {name!r}{did_you_mean(name, protocols)} Those that come with otkd "
        f"are {', '.join(sorted(protocols))}; --protocol FILE.toml takes one of your own."
    )


def _shipped() -> dict[str, Path]:
    """The files that come with otkd; where a folder is before another, so are its files."""
    return {path.stem: path for folder in reversed(_FOLDERS) for path in folder.glob("*.toml")}


def _parse(name: str, content: Any) -> Protocol:
    content = _checked("the file", content, _OF_THE_FILE)
    if "losses" not in content:
        raise ValueError("it has no [losses.NAME]")
    check_file_names(content["losses"], "[losses.{}]")
    losses = {}
    for key, values in content["losses"].items():
        where = f"[losses.{key}]"
        values = _checked(where, values, _OF_A_LOSS)
        candidates = values.get("candidates", ())
        candidates = [_checked(f"{where} candidates", each, _TUNED) for each in candidates]
        losses[key] = values | {"candidates": tuple(candidates)}
    tuning = content.get("tuning")
    if tuning is None and any(loss["candidates"] for loss in losses.values()):
        raise ValueError("its losses have candidates, but there is no [tuning] to choose by")
    return Protocol(
        name,
        content.get("title", name),
        content.get("seeds", 5),
        _checked("[settings]", content.get("settings", {}), _SHARED),
        {
            get_task(task).name: _checked(f"[tasks.{task}]", values, _SHARED)
            for task, values in content.get("tasks", {}).items()
        },
        losses,
        None if tuning is None else _tuning(tuning),
    )


def _tuning(values: Any) -> Tuning:
    values = _checked("[tuning]", values, _OF_TUNING)
    try:
        return Tuning(values.pop("train_rows"), values.pop("held_out"), values)
    except KeyError as missing:
        raise ValueError(f"[tuning] has no {missing}") from missing


def _checked(where: str, values: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A table's values, of the kinds these names have, and whole numbers as floats where wanted."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a table, not {shown(values)}")
    return {name: _entry(where, name, value, kinds) for name, value in values.items()}


def _entry(where: str, name: str, value: Any, kinds: Mapping[str, Any]) -> Any:
    if name not in kinds:
        hint = did_you_mean(name, kinds)
        raise ValueError(
            f"{where} has an unknown entry {shown(name)}{hint} Known are {', '.join(kinds)}"
        )
    allowed = get_args(kinds[name]) or (kinds[name],)
    # Not isinstance: true and false are no numbers.
    whole = type(value) is int and float in allowed
    if type(value) not in allowed and not whole:
        raise ValueError(f"{where}: {name} must be {_KINDS[allowed[0]]}, not {shown(value)}")
    complaint = RANGES[name].complaint(value) if name in RANGES else None
    if complaint:
        raise ValueError(f"{where}: {name} {complaint}")
    try:
        return float(value) if whole else value
    except OverflowError:
        raise ValueError(f"{where}: {name} is too large: {shown(value)}") from None
