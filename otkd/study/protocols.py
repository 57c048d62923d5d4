"""Protocols: files that fix the settings, the losses and the tuning of a comparison."""

from __future__ import annotations

import dataclasses
import stat
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model

from otkd.checks import did_you_mean
from otkd.files import sentence
from otkd.study.messages import StudyError
from otkd.study.names import check_file_names
from otkd.study.settings import STRICT, Seeds, Settings
from otkd.study.validation import first_mistake
from otkd.tasks import get_task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

# A wheel has the protocols beside this module, a checkout among its examples.
_FOLDERS = (
    Path(__file__).with_name("protocols"),
    Path(__file__).parents[2] / "examples" / "glue" / "protocols",
)
_MOST_BYTES = 1_000_000
# Settings that may differ between the losses of a task. Data and teacher are the same for all.
# group_by_length of [settings] is also the teacher's, that of a loss only its students'.
_OF_A_LOSS = (
    *("epochs", "batch_size", "learning_rate", "group_by_length"),
    *("temperature", "anneal", "rescale_t2", "alpha"),
    *("sinkhorn_weight", "epsilon", "author", "batch_cost", "batch_temperature", "debias"),
    *("iterations", "sample_cost", "price", "smoothing", "direction", "token_cost"),
)


class _Strict(BaseModel):
    model_config = STRICT


def _table(title: str, names: Iterable[str]) -> type[_Strict]:
    """A table of a protocol file that may have any of these settings, with their types."""
    fields = Settings.__pydantic_fields__  # pyright: ignore[reportAttributeAccessIssue]
    described: Any = {name: (fields[name].annotation, fields[name]) for name in names}
    return create_model(title, __base__=_Strict, **described)


_Shared = _table("settings", [f.name for f in dataclasses.fields(Settings)][2:])
_Tried = _table("candidates", _OF_A_LOSS)


class _Loss(_Tried):
    loss: str = ""
    title: str = ""
    curves: list = Field(default=[])
    candidates: list[_Tried] = Field(default=[])  # pyright: ignore[reportInvalidTypeForm]


class _Tuning(_Tried):
    train_rows: int = Field(ge=1, le=10**9)
    held_out: float = Field(gt=0, lt=1)


class _File(_Strict):
    title: str = ""
    seeds: Seeds = 5
    settings: _Shared = _Shared()  # pyright: ignore[reportInvalidTypeForm]
    tasks: dict[str, _Shared] = {}  # pyright: ignore[reportInvalidTypeForm]
    losses: dict[str, _Loss] = Field(min_length=1)
    tuning: _Tuning | None = None


@dataclass(frozen=True)
class Objective:
    """A loss with all settings of its training.

    Attributes:
        name: its name in tables and files.
        loss: its name in the registry.
        settings: of its training.
        candidates: settings of which tuning chooses one; each replaces some of ``settings``.
    """

    name: str
    loss: str
    settings: Settings
    candidates: tuple[Mapping[str, Any], ...] = ()

    def tried(self, **settings: Any) -> list[Objective]:
        """One objective per candidate, or this one if there are none.

        Args:
            **settings: of all of them; those of a candidate take precedence.
        """
        return [
            dataclasses.replace(
                self,
                settings=dataclasses.replace(self.settings, **{**settings, **candidate}),
                candidates=(),
            )
            for candidate in self.candidates
        ] or [self]


@dataclass(frozen=True)
class Tuning:
    """How the candidates of a loss are compared, without using development rows.

    Attributes:
        train_rows: number of training rows of a candidate.
        held_out: share of the training rows that scores the candidates.
        settings: of these trainings only. They replace those of the loss; those of a candidate take
            precedence. A training on fewer rows may need a higher learning rate.
    """

    train_rows: int
    held_out: float
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def without(self, given: Collection[str]) -> Tuning:
        """The same tuning without the settings that the user gave on the command line."""
        return dataclasses.replace(self, settings=_without(self.settings, given))


@dataclass(frozen=True)
class Protocol:
    """The checked content of a protocol file.

    Attributes:
        name: name of the file without its suffix; results are kept under it.
        title: one line for tables.
        seeds: students per loss.
        settings: of all tasks, by field of :class:`~otkd.study.settings.Settings`.
        tasks: further settings by task.
        losses: by name; each has settings, ``candidates`` and maybe ``loss``, ``title`` and
            ``curves``, the settings over which a report draws a curve.
        tuning: how candidates are compared; None without candidates.
    """

    name: str
    title: str
    seeds: int
    settings: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    losses: Mapping[str, Mapping[str, Any]]
    tuning: Tuning | None = None

    def resolve(self, settings: Settings, given: Collection[str]) -> Settings:
        """The settings of ``settings.task`` that all losses share.

        Args:
            settings: of the command line.
            given: the fields that the user gave there, which take precedence.
        """
        values = {**self.settings, **self.tasks.get(get_task(settings.task).name, {})}
        return dataclasses.replace(settings, **_without(values, given))

    def objectives(
        self, settings: Settings, given: Collection[str], names: Iterable[str] = ()
    ) -> list[Objective]:
        """The losses ``names``, or all of the protocol; the other arguments as in :meth:`resolve`.

        Raises:
            StudyError: for a name that the protocol does not have.
        """
        objectives = []
        for name in list(names) or self.losses:
            if name not in self.losses:
                raise StudyError(
                    f"The protocol {self.name!r} has no loss {name!r}"
                    f"{did_you_mean(name, self.losses)} It has {', '.join(self.losses)}."
                )
            values = _without(self.losses[name], (*given, "title", "curves"))
            loss, candidates = values.pop("loss", name), values.pop("candidates")
            own = dataclasses.replace(settings, **values)
            objectives.append(Objective(name, loss, own, _left(candidates, given)))
        return objectives


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _left(candidates: Iterable[Mapping[str, Any]], given: Collection[str]) -> tuple[dict, ...]:
    """The different candidates that remain without the settings that the user gave."""
    left: list[dict] = []
    for candidate in candidates:
        if (rest := _without(candidate, given)) not in left:
            left.append(rest)
    return tuple(left) if any(left) else ()


def load_protocol(name: str) -> Protocol:
    """Read a protocol by its name (``author``, ``fair``) or from a file ``*.toml``.

    Raises:
        StudyError: if there is none, or an entry is not valid; the message names file and entry.
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
        raise StudyError(f"The protocol {path} has too deeply nested tables or lists.") from error
    except ValidationError as error:
        raise StudyError(f"The protocol {path}: {_mistake(error)}") from error
    except ValueError as error:
        raise StudyError(f"The protocol {path}: {error}") from error


def _read(path: Path) -> str:
    status = path.stat()
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
    found = {path.stem: path for folder in reversed(_FOLDERS) for path in folder.glob("*.toml")}
    if name in found:
        return found[name]
    raise StudyError(
        f"There is no protocol {name!r}{did_you_mean(name, found)} otkd includes "
        f"{', '.join(sorted(found))}; --protocol FILE.toml reads your own."
    )


def _parse(name: str, content: Any) -> Protocol:
    file = _File.model_validate(content)
    check_file_names(file.losses, "[losses.{}]")
    losses = {}
    for key, loss in file.losses.items():
        own = content["losses"][key]
        tried = map(_values, loss.candidates, own.get("candidates", ()))
        losses[key] = _values(loss, own) | {"candidates": tuple(tried)}
    if file.tuning is None and any(loss["candidates"] for loss in losses.values()):
        raise ValueError("its losses have candidates, but there is no [tuning] to compare them")
    tuning = None
    if file.tuning is not None:
        values = _values(file.tuning, content["tuning"])
        tuning = Tuning(values.pop("train_rows"), values.pop("held_out"), values)
    tasks = {
        get_task(task).name: _values(v, content["tasks"][task]) for task, v in file.tasks.items()
    }
    shared = _values(file.settings, content.get("settings", {}))
    return Protocol(name, file.title or name, file.seeds, shared, tasks, losses, tuning)


def _values(table: BaseModel, written: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values of the entries that are written in the file, in its order."""
    return {name: getattr(table, name) for name in written}


def _mistake(error: ValidationError) -> str:
    """A sentence about a mistake in a file, whose entries are named like TOML's dotted keys."""
    # A misspelled name first: what it stands for may be reported as missing, too.
    unknown = [each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"]
    if not unknown:
        return first_mistake(error, _dotted)
    place = unknown[0]
    known = _known(place).model_fields
    hint = did_you_mean(str(place[-1]), known)
    return f"{_dotted(place)} is not known{hint} Known are {', '.join(known)}"


def _dotted(place: Sequence[int | str]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def _known(place: Sequence[int | str]) -> type[BaseModel]:
    """The table that holds the entry at ``place``."""
    if len(place) == 1:
        return _File
    if "candidates" in place[2:-1]:
        return _Tried
    return {"losses": _Loss, "tuning": _Tuning}.get(str(place[0]), _Shared)
