"""What a results folder holds: every result file under its protocol, task, loss and seed."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from otkd.cli.console import CommandError
from otkd.cli.protocols import Protocol, load_protocol
from otkd.cli.results import CorruptResultError, Result, read_result
from otkd.tasks.tasks import DataError, Task, get_task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

PROTOCOLS = ("author", "fair", "sensitivity")
# The losses that the report compares others with, and the one that it is about.
BASELINE, LABELS, SUBJECT = "kl", "ce", "sinkd"

Runs = dict[str, dict[int, Result]]


@dataclass
class TaskResults:
    """The results of one task under one protocol.

    Attributes:
        task: the task.
        teacher: its result, or None if there is none.
        runs: by loss, in the protocol's order, and seed; losses that were not run are empty.
        tuning: by loss and number of the candidate.
    """

    task: Task
    teacher: Result | None = None
    runs: Runs = field(default_factory=dict)
    tuning: Runs = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether any student was trained."""
        return any(self.runs.values())

    @property
    def majority(self) -> dict[str, float]:
        """What always answering the class most frequent in training scores, if it is known."""
        return self.teacher.majority_metrics if self.teacher else {}

    def all(self) -> list[Result]:
        """Every result: the teacher's, the students', the candidates'."""
        parts = (*self.runs.values(), *self.tuning.values())
        students = [result for part in parts for _, result in sorted(part.items())]
        return students if self.teacher is None else [self.teacher, *students]

    def scores(self, loss: str, metric: str | None = None) -> dict[int, float]:
        """By seed, as fractions of one; of the headline metric if none is named."""
        metric = metric or self.task.headline
        return {seed: run.metrics[metric] for seed, run in self.runs.get(loss, {}).items()}


@dataclass(frozen=True)
class Study:
    """A protocol and the results of its tasks."""

    protocol: Protocol
    tasks: Mapping[str, TaskResults]

    def title(self, loss: str) -> str:
        """A loss's name in tables."""
        return self.protocol.losses.get(loss, {}).get("title", loss)

    def label(self, loss: str) -> str:
        """Its title, or its name where others have the same title."""
        titles = [self.title(other) for other in self.protocol.losses]
        return self.title(loss) if titles.count(self.title(loss)) == 1 else loss


@dataclass
class Collection:
    """All that a report is made of.

    Attributes:
        studies: by protocol, those of ``PROTOCOLS`` with every task of the report, then others
            that have results.
        problems: what was left out, and why.
        reasons: why a task was not run, or not as often as asked, by protocol and task.
        commands: what made the results, by protocol.
        diagnosis: sections to be shown as they are.
        files: number of result files read.
        digest: SHA-256 over the files read.
    """

    studies: dict[str, Study]
    problems: list[str]
    reasons: dict[tuple[str, str], str]
    commands: dict[str, list[str]]
    diagnosis: list[dict[str, Any]]
    files: int
    digest: str


def collect(root: Path, tasks: tuple[str, ...]) -> Collection:
    """Read ``root/<protocol>/<task>/<loss>/<seed>.json`` and what lies beside it.

    Files that are corrupt, out of place or of another teacher are left out and named in
    ``problems``.

    Args:
        root: the results folder.
        tasks: names of tasks that the report has a place for, run or not.

    Raises:
        CommandError: if the folder does not exist or has no result, or notes and diagnosis cannot
            be read.
    """
    if not root.is_dir():
        raise CommandError(f"--results-dir {root} is not a folder.")
    reader = _Reader(root)
    studies = {name: reader.study(load_protocol(name), tasks) for name in PROTOCOLS}
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name not in PROTOCOLS:
            try:
                studies[path.name] = reader.study(load_protocol(path.name), ())
            except CommandError:
                reader.problems.append(f"{path.name}: of no protocol that comes with otkd")
    if not any(results for study in studies.values() for results in study.tasks.values()):
        found = "".join(f"\n  {problem}" for problem in reader.problems)
        raise CommandError(
            f"--results-dir {root} holds no result of a student at "
            f"{{{','.join(PROTOCOLS)}}}/TASK/LOSS/SEED.json; `otkd compare TASK --protocol fair "
            f"--output-dir {root}` makes them.{found}"
        )
    notes, diagnosis = root / "notes.toml", root / "diagnosis.json"
    reasons, commands = _read_notes(notes)
    found = _read_diagnosis(diagnosis)
    for path in filter(Path.is_file, (notes, diagnosis)):
        reader.digest.update(path.read_bytes())
    return Collection(
        studies,
        reader.problems,
        reasons,
        commands,
        found,
        reader.files,
        reader.digest.hexdigest(),
    )


class _Reader:
    """Reads result files, keeping count of them and of what is wrong with others."""

    def __init__(self, root: Path):
        self.root = root
        self.problems: list[str] = []
        self.files = 0
        self.digest = hashlib.sha256()

    def study(self, protocol: Protocol, tasks: tuple[str, ...]) -> Study:
        """All tasks of one protocol: those of the report, those with results."""
        folder = self.root / protocol.name
        found: dict[str, Path] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            try:
                if path.is_dir():
                    found[get_task(path.name).name] = path
            except DataError:
                self._leave_out(path, "of no task that otkd knows")
        names = dict.fromkeys((*tasks, *found))
        return Study(
            protocol,
            {name: self._task(protocol, get_task(name), found.get(name)) for name in names},
        )

    def _task(self, protocol: Protocol, task: Task, folder: Path | None) -> TaskResults:
        results = TaskResults(
            task,
            runs={loss: {} for loss in protocol.losses},
            tuning={loss: {} for loss in protocol.losses},
        )
        if folder is None:
            return results
        results.teacher = self._read(folder / "teacher" / "result.json", task, "teacher")
        for path in sorted(path for path in folder.iterdir() if path.is_dir()):
            if path.name in protocol.losses:
                results.runs[path.name] = self._numbered(path, task, results.teacher)
                results.tuning[path.name] = self._numbered(path / "tuning", task, results.teacher)
            elif path.name != "teacher" and any(path.glob("*.json")):
                self._leave_out(path, f"the protocol {protocol.name!r} has no such loss")
        return results

    def _numbered(self, folder: Path, task: Task, teacher: Result | None) -> dict[int, Result]:
        found = {}
        for path in sorted(folder.glob("*.json")):
            if not path.stem.isdecimal():
                self._leave_out(path, "its name is not a number")
                continue
            tuning = folder.name == "tuning"
            loss = folder.parent.name if tuning else folder.name
            result = self._read(path, task, loss)
            if result is None:
                continue
            if not tuning and result.seed != int(path.stem):
                self._leave_out(path, f"it says that it is of seed {result.seed}")
            elif teacher is not None and result.teacher_logits != teacher.teacher_logits:
                self._leave_out(path, "it had another teacher than the one beside it")
            else:
                found[int(path.stem)] = result
        return dict(sorted(found.items()))

    def _read(self, path: Path, task: Task, loss: str) -> Result | None:
        try:
            result = read_result(path)
        except FileNotFoundError:
            return None
        except (CorruptResultError, OSError) as error:
            self._leave_out(path, str(error).removeprefix(f"{path} "))
            return None
        if (result.task, result.loss) != (task.name, loss):
            self._leave_out(path, f"it says that it is of {result.task}, {result.loss}")
            return None
        if result.diverged:
            self._leave_out(
                path, f"its training diverged after {result.steps} steps: {result.reason}"
            )
            return None
        metrics = {
            task.metric_key(split, metric) for split in task.dev_splits for metric in task.metrics
        }
        if set(result.metrics) != metrics or not all(map(math.isfinite, result.metrics.values())):
            self._leave_out(path, f"it does not have a number for each of {sorted(metrics)}")
            return None
        self.files += 1
        self.digest.update(path.relative_to(self.root).as_posix().encode())
        self.digest.update(path.read_bytes())
        return result

    def _leave_out(self, path: Path, why: str) -> None:
        self.problems.append(f"{path.relative_to(self.root).as_posix()}: {why}")


def _read_notes(path: Path) -> tuple[dict[tuple[str, str], str], dict[str, list[str]]]:
    """``[protocol.task] reason = "…"`` and ``[protocol] commands = ["…"]``, if there are any."""
    reasons, commands = {}, {}
    if not path.is_file():
        return reasons, commands
    try:
        for protocol, values in tomllib.loads(path.read_text(encoding="utf-8")).items():
            commands[protocol] = [str(command) for command in values.pop("commands", ())]
            for task, note in values.items():
                reasons[protocol, get_task(task).name] = str(note["reason"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(
            f'{path} is not made of [PROTOCOL.TASK] with reason = "…" and [PROTOCOL] with '
            f'commands = ["…"]: {error}'
        ) from error
    return reasons, commands


def _read_diagnosis(path: Path) -> list[dict[str, Any]]:
    """The sections of the diagnosis, if there is one."""
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sections = content if isinstance(content, list) else [content]
        return [
            {
                "title": str(section["title"]),
                "lines": [str(line) for line in section.get("lines", [])],
                "columns": [str(cell) for cell in section.get("table", {}).get("columns", [])],
                "rows": [
                    [str(cell) for cell in row] for row in section.get("table", {}).get("rows", [])
                ],
            }
            for section in sections
        ]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(
            f'{path} is not a list of {{"title", "lines", "table": {{"columns", "rows"}}}}: '
            f"{error!r}"
        ) from error
