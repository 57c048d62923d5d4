"""The tables of the appendix of docs/glue.md: how the results were made, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from glue_results import PROTOCOLS, Study, read_toml
from glue_tables import NONE, Studies, markdown, number

from otkd.study.messages import StudyError
from otkd.tasks import Task, get_task


def runs(studies: Studies) -> str:
    """What was trained, on what."""
    rows = []
    for study in studies.values():
        for task in study.tasks:
            students = [*study.select("student", task).result]
            settings = students[0].settings
            layers = settings.get("student", f"{settings.get('student_layers')} of its layers")
            counts = " / ".join(f"{students[0].rows[split]:,}" for split in ("train", "dev"))
            tried = len(study.select("candidate", task))
            cells = [study.protocol.name, task.title, settings["teacher"], str(layers), counts]
            done, wanted = _students(study, task)
            cells += [students[0].precision, str(tried or NONE), f"{done} of {wanted}"]
            rows.append(cells)
    header = ["protocol", "task", "teacher", "student", "rows, train / dev", "precision"]
    return markdown([*header, "candidates", "students"], rows, text=6)


def _students(study: Study, task: Task) -> tuple[int, int]:
    """The number of students that there are and that the protocol asks for."""
    seeds, counts = study.protocol.seeds, study.select("student", task).loss.value_counts()
    return sum(min(count, seeds) for count in counts), seeds * len(study.protocol.losses)


def missing(studies: Studies, root: Path) -> str:
    """The tasks with no student or fewer than asked for, and why."""
    notes = read_toml(root / "notes.toml")
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name in PROTOCOLS:
        study, own = studies[name], notes.get(name, {})
        reasons = {get_task(task): own[task]["reason"] for task in own if task != "commands"}
        for task in dict.fromkeys((*study.tasks, *reasons)):
            done, wanted = _students(study, task)
            if done < wanted:
                key = name, f"{done} of {wanted}", reasons.get(task, NONE)
                rows.setdefault(key, []).append(task.title)
    cells = [[name, ", ".join(tasks), done, why] for (name, done, why), tasks in rows.items()]
    return markdown(["protocol", "tasks", "students", "reason"], cells, text=4)


def commands(root: Path) -> str:
    """The commands that made the results."""
    notes = read_toml(root / "notes.toml")
    rows = [[name, f"`{each}`"] for name in notes for each in notes[name].get("commands", ())]
    return markdown(["protocol", "command"], rows, text=2)


def candidates(study: Study) -> str:
    """The held-out scores that chose the settings of each loss, the best in bold."""
    scores = {task.title: study.scores(task, role="candidate") for task in study.tasks}
    rows = []
    for loss, values in study.protocol.losses.items():
        for place, candidate in enumerate(values["candidates"]):
            cells = []
            for table in scores.values():
                held_out = table[loss].get(place, np.nan)
                text = number(held_out)
                best = place == table[loss].idxmax() if table[loss].any() else False
                cells.append(f"**{text}**" if best else text)
            rows.append([study.title(loss), _label(candidate), *cells])
    return markdown(["loss", "candidate", *scores], rows, text=2)


def _label(settings: Mapping[str, Any]) -> str:
    """The settings of a candidate in one line."""
    values = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in settings.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def gradients(root: Path) -> str:
    """What `benchmarks/glue_diagnosis.py` measured, task by task."""
    path = root / "diagnosis.json"
    try:
        sections = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        tables = [(each["title"].split(":")[0], each["table"]) for each in sections]
        rows = [[title, *cells] for title, table in tables for cells in table["rows"]]
        columns = tables[0][1]["columns"][1:] if tables else []
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is not what glue_diagnosis.py writes: {error!r}.") from error
    return markdown(["task", "quantity", *columns], rows, text=2)
