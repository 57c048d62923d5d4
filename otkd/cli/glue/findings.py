"""What follows from results: differences of losses, the gain of the best evaluation, cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from otkd.cli.catalogue import loss_parameters
from otkd.cli.glue.collect import BASELINE, SUBJECT, Study, TaskResults
from otkd.cli.glue.published import Published
from otkd.cli.results import Result
from otkd.cli.stats import (
    Estimate,
    PairedDifference,
    binomial_tail,
    estimate,
    paired_difference,
)
from otkd.losses.sinkd import UnrolledBatchSinkhornLoss
from otkd.tasks.tasks import Task

# The outcomes of a comparison.
ABOVE, BELOW, TOGETHER, UNKNOWN = "above", "below", "not apart", "unknown"


def outcome(difference: PairedDifference | None) -> str:
    """Which side of 0 an interval lies on, if it is on one."""
    if difference is None or difference.interval is None:
        return UNKNOWN
    if not difference.apart:
        return TOGETHER
    return ABOVE if difference.mean > 0 else BELOW


def difference(
    results: TaskResults, loss: str, baseline: str, metric: str | None = None
) -> PairedDifference | None:
    """``loss`` − ``baseline`` over the seeds that both have."""
    return paired_difference(results.scores(loss, metric), results.scores(baseline, metric))


@dataclass(frozen=True)
class Comparison:
    """One loss against another on a task's headline metric."""

    task: Task
    loss: str
    baseline: str
    ours: PairedDifference | None
    published: float | None = None
    unconfirmed: bool = False

    @property
    def outcome(self) -> str:
        """Which side of 0 the interval lies on, if it is on one."""
        return outcome(self.ours)

    @property
    def same_side(self) -> bool:
        """Whether the interval lies on the side of 0 that was published."""
        return self.outcome == (ABOVE if (self.published or 0.0) > 0 else BELOW)

    @property
    def reproduced(self) -> bool:
        """Whether it does and has what was published within it."""
        return self.same_side and self.covers_published

    @property
    def reversed(self) -> bool:
        """Whether it lies on the other side."""
        return self.outcome in (ABOVE, BELOW) and not self.same_side

    @property
    def covers_published(self) -> bool:
        """Whether the published difference lies within the interval."""
        if self.ours is None or self.ours.interval is None or self.published is None:
            return False
        return abs(self.published - self.ours.mean) <= self.ours.interval


def published_comparisons(study: Study, published: Published) -> list[Comparison]:
    """The loss of the published table against each of its baselines, on each of its tasks.

    Losses published as equal are left out: they have no difference to reproduce.
    """
    baselines = [name for name in study.protocol.losses if name != SUBJECT]
    found = []
    for task in published.tasks:
        results = study.tasks[task]
        for baseline in baselines:
            theirs = published.difference(SUBJECT, baseline, task, results.task.headline)
            if theirs:
                ours = difference(results, SUBJECT, baseline)
                doubt = not published.unconfirmed.isdisjoint((SUBJECT, baseline))
                found.append(Comparison(results.task, SUBJECT, baseline, ours, theirs, doubt))
    return found


def comparisons_to(study: Study, baseline: str = BASELINE) -> list[Comparison]:
    """Every other loss against ``baseline`` on every task that has both."""
    return [
        Comparison(results.task, loss, baseline, ours)
        for results in study.tasks.values()
        for loss in results.runs
        if loss != baseline and (ours := difference(results, loss, baseline)) is not None
    ]


def best_comparison(comparisons: Iterable[Comparison], task: str) -> Comparison | None:
    """The loss that is furthest above the baseline on a task, if any is above it by its mean."""
    above = [
        (each.ours.mean, each)
        for each in comparisons
        if each.task.name == task and each.ours is not None and each.ours.mean > 0
    ]
    return max(above, key=lambda pair: pair[0])[1] if above else None


def above_students(results: TaskResults, loss: str) -> PairedDifference | None:
    """The one teacher − the students of ``loss``; the interval is that of the students."""
    if results.teacher is None:
        return None
    scores = results.scores(loss)
    return paired_difference(dict.fromkeys(scores, results.teacher.score), scores)


def above_majority(results: TaskResults, loss: str) -> PairedDifference | None:
    """The students of ``loss`` − always answering the class most frequent in training."""
    answered = results.majority.get(results.task.headline)
    if answered is None:
        return None
    scores = results.scores(loss)
    return paired_difference(scores, dict.fromkeys(scores, answered))


def teacher_by_chance(results: TaskResults) -> float | None:
    """How likely a guess as good as the teacher is on so many rows; None if it is not known.

    Of the rows that it has right, if a row were right with the probability of the majority class;
    of a correlation φ over n rows, n·φ² is χ² of one degree.
    """
    teacher, rows = results.teacher, results.teacher.rows.get("dev") if results.teacher else None
    if teacher is None or rows is None or len(results.task.dev_splits) > 1:
        return None
    if results.task.headline == "mcc":
        from scipy.special import chdtrc

        return float(chdtrc(1, rows * teacher.score**2))
    if "accuracy" not in teacher.metrics or "accuracy" not in results.majority:
        return None
    right = round(teacher.metrics["accuracy"] * rows)
    return binomial_tail(right, rows, results.majority["accuracy"])


def inflation(results: TaskResults, loss: str) -> Estimate | None:
    """Best − last evaluation of a training, over its runs with more than one evaluation."""
    gains = []
    for run in results.runs[loss].values():
        scores = evaluation_scores(run)
        if len(scores) > 1:
            gains.append(max(scores) - scores[-1])
    return estimate(gains) if gains else None


def evaluation_scores(run: Result) -> list[float]:
    """The headline metric at every evaluation."""
    return [entry[run.headline] for entry in run.evaluations if run.headline in entry]


def seconds_per_step(results: TaskResults, loss: str) -> float | None:
    """Of the fastest run of a loss: what else the machine did adds to the others."""
    return min(
        (run.seconds_per_step for run in results.runs[loss].values() if run.steps), default=None
    )


@dataclass(frozen=True)
class Point:
    """One loss of a curve on one task.

    Attributes:
        loss: its name in the protocol.
        value: of the setting that the curve is over.
        score: of the headline metric.
        seeds: how many.
        difference: to the baseline at the same place, or to the one baseline of the protocol.
    """

    loss: str
    value: float
    score: Estimate
    seeds: int
    difference: PairedDifference | None


def curve_names(study: Study) -> list[str]:
    """The settings that losses of a protocol are points of a curve over."""
    names = (name for loss in study.protocol.losses.values() for name in loss.get("curves", ()))
    return list(dict.fromkeys(names))


def curve(study: Study, results: TaskResults, name: str) -> dict[str, list[Point]]:
    """The points over the setting ``name``, from left to right, by the title of their series."""
    placed = []
    for loss, values in study.protocol.losses.items():
        runs = list(results.runs[loss].values())
        place = _setting(runs[0], name) if runs else None
        if name in values.get("curves", ()) and isinstance(place, (int, float)):
            placed.append((float(place), loss))
    series: dict[str, list[Point]] = {}
    for place, loss in sorted(placed):
        scores = results.scores(loss)
        beside = [other for where, other in placed if where == place and is_baseline(study, other)]
        baseline = beside[0] if beside else BASELINE
        ours = difference(results, loss, baseline) if loss != baseline else None
        point = Point(loss, place, estimate(list(scores.values())), len(scores), ours)
        series.setdefault(study.title(loss), []).append(point)
    return series


def references(study: Study, results: TaskResults, name: str) -> dict[str, Estimate]:
    """Losses that are no point of a curve and stand beside it as a line, by title."""
    found = {}
    for loss, values in study.protocol.losses.items():
        curves = values.get("curves", ())
        if results.runs[loss] and name not in curves and (loss == BASELINE or not curves):
            found[study.title(loss)] = estimate(list(results.scores(loss).values()))
    return found


def is_baseline(study: Study, loss: str) -> bool:
    """Whether a loss of a protocol is the baseline with settings of its own."""
    return study.protocol.losses[loss].get("loss", loss) == BASELINE


def _setting(run: Result, name: str) -> Any:
    value = run.settings.get(f"loss.{name}", run.settings.get(name))
    if value is None and name == "iterations" and run.settings.get("loss.author"):
        # Unsaid, it is as many as the public code makes.
        return loss_parameters(UnrolledBatchSinkhornLoss)["iterations"].default
    return value
