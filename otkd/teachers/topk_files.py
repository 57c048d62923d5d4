"""The safetensors file of a :class:`~otkd.teachers.TopKTeacher`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from otkd.teachers.self_term import SelfTermSettings
from otkd.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from otkd.teachers.topk import TopKTeacher


def save_topk(path: str | os.PathLike, teacher: TopKTeacher) -> None:
    """See :meth:`otkd.teachers.TopKTeacher.save`."""
    tensors = {"tokens": teacher.tokens, "log_masses": teacher.log_masses}
    metadata = {"vocab_size": str(teacher.vocab_size), "temperature": repr(teacher.temperature)}
    if teacher.self_potential is not None and teacher.self_settings is not None:
        tensors["self_potential"] = teacher.self_potential
        metadata["self_settings"] = json.dumps(teacher.self_settings)
    save_tensors(path, tensors, metadata)


def load_topk(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of the stored teacher, not yet validated.

    Raises:
        ValueError: if the file is not a safetensors file or its metadata is missing or damaged.
    """
    tensors, metadata = load_tensors(path, "tokens", "log_masses")
    try:
        settings = None
        if "self_settings" in metadata:
            # Files of earlier versions have only the first two.
            epsilon, costs, *more = json.loads(metadata["self_settings"])
            settings = SelfTermSettings(float(epsilon), tuple(map(float, costs)))
            if more:
                debias, penalties = more
                settings = settings._replace(
                    debias=str(debias), penalties=tuple(map(float, penalties))
                )
        return {
            "tokens": tensors["tokens"],
            "log_masses": tensors["log_masses"],
            "vocab_size": int(metadata["vocab_size"]),
            "temperature": float(metadata["temperature"]),
            "self_potential": tensors.get("self_potential"),
            "self_settings": settings,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the settings in {path} are missing or damaged: {error!r}") from error
