"""The training of one student, which continues from its last checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pilot_data import Material, Sequences
from pilot_metrics import CURVE_MEASURES, evaluate
from pilot_objectives import Schedule
from pilot_protocol import Protocol, Training
from torch import Tensor, nn

from otkd.files import written_whole

CHECKPOINT_EVERY, LOG_EVERY, CURVE_EVERY = 100, 10, 50
CURVE_SEQUENCES = 16
_CURVE = ("cross_entropy", "agreement", *CURVE_MEASURES)


@dataclass
class Trained:
    """The course of a training.

    Attributes:
        steps: those that were taken.
        seconds: duration of the steps, without evaluation and checkpoints.
        cpu_seconds: processor time of the steps, which depends less on what else the machine does.
        log: loss, norm of the gradient and learning rate of some steps.
        curve: metrics on a few held-out sequences at some steps, from 0 on.
        reason: what was not finite, if the training diverged.
    """

    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """What one training needs.

    Attributes:
        protocol: the settings that all trainings share.
        training: steps and learning rate.
        schedule: the loss at any part of the training.
        sequences: what the student reads.
        seed: of the order of the sequences.
        checkpoint: the file of its last checkpoint.
        advance: counts steps for a progress bar.
    """

    protocol: Protocol
    training: Training
    schedule: Schedule
    sequences: Sequences
    seed: int
    checkpoint: Path
    advance: Callable[[int], None]


def train(student: Any, material: Material, job: Job) -> Trained:
    """Train a student in place, from its last checkpoint if there is one."""
    rate, steps = job.training.learning_rate, job.training.steps
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    factor = _schedule(job.protocol.warmup, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    parts = {"student": student, "optimizer": optimizer, "scheduler": scheduler}
    course = _resumed(job.checkpoint, parts)
    job.advance(course.steps)
    order = _order(len(job.sequences.inputs), job.protocol.batch, steps, job.seed)
    student.train()
    while course.steps < steps:
        if course.steps % CURVE_EVERY == 0:
            course.curve.append(_curve_point(course.steps, student, material))
        wall, cpu = time.perf_counter(), time.process_time()
        rate = optimizer.param_groups[0]["lr"]
        loss, norm = _backward(student, material, job, order[course.steps], course.steps / steps)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            course.reason = f"loss {loss}, norm of the gradient {norm}"
            return course
        optimizer.step()
        scheduler.step()
        course.steps += 1
        course.seconds += time.perf_counter() - wall
        course.cpu_seconds += time.process_time() - cpu
        if course.steps % LOG_EVERY == 0 or course.steps == 1:
            entry = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
            course.log.append({"step": course.steps, **entry})
        if course.steps % CHECKPOINT_EVERY == 0 or course.steps == steps:
            _save(job.checkpoint, parts, course)
        job.advance(1)
    return course


def _backward(
    student: Any, material: Material, job: Job, rows: Tensor, done: float
) -> tuple[float, float]:
    student.zero_grad()
    theirs = material.teacher_logits(job.sequences.states[rows])
    ours = student(job.sequences.inputs[rows]).logits
    loss = job.schedule(done)(ours, theirs, labels=job.sequences.labels[rows])
    loss.backward()
    norm = nn.utils.clip_grad_norm_(student.parameters(), job.protocol.clip)
    return loss.item(), norm.item()


def _schedule(warmup: int, steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        return min((step + 1) / (warmup + 1), max(steps - step, 0) / max(steps - warmup, 1), 1.0)

    return factor


def _order(sequences: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """The rows of each step: every epoch has its own order, without what does not fill a batch."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    while len(rows) < steps:
        epoch = torch.randperm(sequences, generator=generator)
        rows += epoch[: sequences // batch * batch].split(batch)
    return rows[:steps]


def _curve_point(step: int, student: Any, material: Material) -> dict[str, float]:
    held_out = material.sequences("held_out")
    few = Sequences(
        held_out.inputs[:CURVE_SEQUENCES],
        held_out.labels[:CURVE_SEQUENCES],
        held_out.states[:CURVE_SEQUENCES],
    )
    values = evaluate(student, material, few, CURVE_MEASURES)
    return {"step": step, **{name: fmean(values[name]) for name in _CURVE}}


def _save(path: Path, parts: dict[str, Any], course: Trained) -> None:
    states = {name: part.state_dict() for name, part in parts.items()}
    with written_whole(path) as partial:
        torch.save({**states, "course": vars(course)}, partial)


def _resumed(path: Path, parts: dict[str, Any]) -> Trained:
    if not path.is_file():
        return Trained()
    content = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(content[name])
    return Trained(**content["course"])
