"""Result files: where they are, and reading and writing them. Does not import torch."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def read(path: Path) -> dict:
    """The JSON object in a file; an empty one if the file is missing or damaged."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def write(path: Path, content: str | Mapping) -> None:
    """Replace a file in one step, so that a reader never sees half of it; JSON for a mapping."""
    if not isinstance(content, str):
        content = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(content, "utf-8")
    unfinished.replace(path)


def said(error: Exception) -> str:
    """An error as the reason why something was not measured."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def unmeasured(reason: str) -> dict:
    """What is stored for a row that failed, or for which the machine lacks something."""
    return {"measured": False, "reason": reason, "cases": [], "targets": []}
