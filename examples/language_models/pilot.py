"""The pilot study: which objective teaches a small language model best, step for step.

    python examples/language_models/pilot.py run --start distant --objectives kl,jsd --seeds 0,1
    python examples/language_models/pilot.py table
    python examples/language_models/pilot.py objectives

A student with some of the layers of SmolLM2-135M-Instruct is trained on IMDB reviews to match its
teacher, by the protocol in pilot.toml. Each run writes one file in results/; finished runs are
skipped and interrupted ones continue from their last checkpoint. README.md describes the study.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pilot_data import Material, Part
from pilot_metrics import evaluate, final_measures
from pilot_objectives import OBJECTIVES, get_objective
from pilot_protocol import DEFAULT, STARTS, Protocol, Start, load_protocol
from pilot_results import is_finished, result_path, tables, write_result
from pilot_training import Job, Trained, train

from otkd.cli.console import StepBar, out, reporting, require_train_extra
from otkd.files import folder_written_whole
from otkd.study.locks import locked
from otkd.study.messages import StudyError, notice, quiet_libraries
from otkd.study.models import load
from otkd.study.provenance import machine, versions
from otkd.study.results import settings_hash
from otkd.tasks.causal_lm import student_of

RESULTS = Path(__file__).with_name("results")
# Of the order of the reviews in the preparation of the start "close".
PREPARATION_SEED = 1000

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Output = Annotated[Path, typer.Option("--output-dir", help="Folder of the result files.")]


@app.command()
def run(
    start: Annotated[str, typer.Option(help=f"What the student is at first: {STARTS}.")],
    objectives: Annotated[str, typer.Option(help="Names, separated by commas.")],
    seeds: Annotated[str, typer.Option(help="Whole numbers, separated by commas.")] = "0",
    output_dir: Output = RESULTS,
    protocol: Annotated[Path, typer.Option(help="Settings, as in pilot.toml.")] = DEFAULT,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of another teacher and its tokenizer.")
    ] = None,
) -> None:
    """Train a student for every objective and seed that has no result yet."""
    with reporting(output_dir):
        require_train_extra()
        quiet_libraries()
        if start not in STARTS:
            raise StudyError(f"There is no start '{start}': choose one of {', '.join(STARTS)}.")
        names = _available(objectives)
        numbers = _seeds(seeds)
        with StepBar() as bar:
            study = _Study(load_protocol(protocol), teacher, output_dir, bar)
            for seed in numbers:
                for name in names:
                    study.run(start, name, seed)


@app.command()
def table(output_dir: Output = RESULTS) -> None:
    """Print means over seeds and differences to KL."""
    with reporting(output_dir):
        found = tables(output_dir)
        if not found:
            raise StudyError(f"There are no results in {output_dir}.")
        # A table in a file is not cut to the width of a terminal.
        out.width = max(out.width, 200)
        for each in found:
            out.print(each)


@app.command("objectives")
def list_objectives() -> None:
    """Print the names of all objectives."""
    for name, objective in OBJECTIVES.items():
        out.print(name if objective.available else f"{name} (not in this version of otkd)")


class _Study:
    """Runs with the same protocol, teacher and folder."""

    def __init__(
        self, protocol: Protocol, teacher: Path | None, folder: Path, bar: StepBar
    ) -> None:
        self._protocol, self._folder, self._bar = protocol, folder, bar
        self._material = Material(protocol, teacher, self._progress)

    def run(self, start: str, name: str, seed: int) -> None:
        """Train and evaluate a student, unless its result is there."""
        schedule = get_objective(name).build(self._material.embedding)
        settings = {
            **self._settings(start, seed),
            "objective": name,
            # Shows changed defaults of a loss, at the start and at the end.
            "loss": [" ".join(repr(schedule(done)).split()) for done in (0.0, 1.0)],
        }
        path = result_path(self._folder, start, name, seed)
        with self._claimed(settings) as checkpoint:
            if is_finished(path, settings):
                notice(f"{start}, {name}, seed {seed}: finished before")
                return
            student = self._prepared() if start == "close" else self._shortened()
            course = self._train(student, schedule, "train", start, seed, checkpoint, name)
            content = self._outcome(student, course)
            write_result(path, settings, content)
            checkpoint.unlink(missing_ok=True)
        self._bar.finished(f"{start}, {name}, seed {seed}: {content['status']}")

    def _outcome(self, student: Any, course: Trained) -> dict[str, Any]:
        held_out = {}
        if not course.reason:
            held_out = evaluate(
                student,
                self._material,
                self._material.sequences("held_out"),
                final_measures(self._material.embedding),
            )
        return {
            "status": "diverged" if course.reason else "finished",
            **vars(course),
            "seconds_per_step": course.seconds / max(course.steps, 1),
            "held_out": held_out,
            "versions": versions(),
            "machine": machine(),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _train(
        self,
        student: Any,
        schedule: Callable[[float], torch.nn.Module],
        part: Part,
        start: Start,
        seed: int,
        checkpoint: Path,
        description: str,
    ) -> Trained:
        training = self._protocol.training(start)
        sequences = self._material.sequences(part)
        advance = self._progress(f"{start}, {description}, seed {seed}", training.steps)
        job = Job(self._protocol, training, schedule, sequences, seed, checkpoint, advance)
        return train(student, self._material, job)

    def _shortened(self) -> Any:
        return student_of(self._material.teacher, self._protocol.layers)

    def _prepared(self) -> Any:
        """The student that "close" starts from, which is trained once and kept in the cache."""
        settings = self._settings("preparation", PREPARATION_SEED)
        folder = self._material.cache / "prepared" / settings_hash(settings)
        with self._claimed(settings) as checkpoint:
            if not folder.is_dir():
                student, schedule = self._shortened(), get_objective("kl").build
                course = self._train(
                    student,
                    schedule(self._material.embedding),
                    "preparation",
                    "preparation",
                    PREPARATION_SEED,
                    checkpoint,
                    "kl",
                )
                if course.reason:
                    raise StudyError(
                        f"The preparation of the start 'close' failed: {course.reason}"
                    )
                with folder_written_whole(folder) as partial:
                    student.save_pretrained(partial)
                checkpoint.unlink(missing_ok=True)
        return load("AutoModelForCausalLM", str(folder), dtype=torch.float32)

    def _settings(self, start: Start, seed: int) -> dict[str, Any]:
        return {
            "start": start,
            "seed": seed,
            "teacher": self._material.digest,
            "protocol": self._protocol.settings(start),
        }

    @contextmanager
    def _claimed(self, settings: dict[str, Any]) -> Iterator[Path]:
        """The file for the checkpoint of a run, which no other command uses meanwhile."""
        folder = self._material.cache / "work" / settings_hash(settings)
        with locked(folder):
            yield folder / "checkpoint.pt"

    def _progress(self, description: str, steps: int) -> Callable[[int], None]:
        self._bar.plan(steps)
        return self._bar.start(description)


def _available(objectives: str) -> list[str]:
    names = []
    for name in dict.fromkeys(part.strip() for part in objectives.split(",")):
        objective = get_objective(name)
        if objective.available:
            names.append(name)
        else:
            notice(f"{name} is skipped: this version of otkd has no {objective.requires}.")
    return names


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise StudyError(f"--seeds {text}: whole numbers from 0 up, separated by commas.")
    return list(dict.fromkeys(seeds))


if __name__ == "__main__":
    app()
