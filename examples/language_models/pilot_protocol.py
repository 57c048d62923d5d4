"""The settings of the pilot study, read from a TOML file."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from otkd.study.messages import StudyError
from otkd.study.settings import STRICT
from otkd.study.validation import first_mistake

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT = Path(__file__).with_name("pilot.toml")
STARTS = ("distant", "close")
Start = Literal["distant", "close", "preparation"]

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, config=STRICT)
class Training:
    """Steps and learning rate of a training."""

    steps: _Count
    learning_rate: _Positive


@dataclass(frozen=True, config=STRICT)
class Protocol:
    """Everything that is the same for all objectives; pilot.toml describes the fields."""

    layers: _Count
    sequences: _Count
    held_out: _Count
    length: _Count
    batch: _Count
    warmup: Annotated[int, Field(ge=0)]
    clip: _Positive
    distant: Training
    close: Training
    preparation: Training

    def __post_init__(self) -> None:
        if self.batch > self.sequences:
            raise ValueError("batch must be at most sequences")

    def training(self, start: Start) -> Training:
        """The training of students with this start."""
        return getattr(self, start)

    def settings(self, start: Start) -> dict[str, Any]:
        """What decides the result of a student with this start."""
        trainings = {"distant", "close", "preparation"}
        used = {"close", "preparation"} if start == "close" else {start}
        return {k: v for k, v in asdict(self).items() if k not in trainings - used}


def load_protocol(path: Path) -> Protocol:
    """Read a protocol.

    Raises:
        StudyError: if the file cannot be read, or a setting is missing, unknown or out of range.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        # As JSON, since a strict dataclass does not accept a dictionary from Python.
        return TypeAdapter(Protocol).validate_json(json.dumps(content))
    except ValidationError as error:
        mistake = first_mistake(error, lambda place: ".".join(map(str, place)))
        raise StudyError(f"{path}: {mistake}") from error
    except (OSError, ValueError, TypeError) as error:
        raise StudyError(f"{path} cannot be read as a protocol: {error}") from error
