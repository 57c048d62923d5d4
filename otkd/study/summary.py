"""The statistics of a comparison, from its result files only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from otkd.study.results import Result


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``interval`` is half the width of its 95 % t-interval.

    The interval covers the variation between seeds (head, dropout, data order), not that between
    samples of the task. It is None for a single seed.
    """

    mean: float
    interval: float | None


@dataclass(frozen=True)
class LossSummary:
    """One loss over its seeds; metrics are in the units of the result files.

    Attributes:
        loss: its name.
        seeds: those that finished.
        scores: the main metric of each of them.
        metrics: mean and interval over all seeds; empty if a seed diverged, since a mean of the
            others would be biased.
        agreement: likewise.
        seconds_per_step: mean over the seeds that finished, or None.
        seconds: likewise.
        diverged: the other seeds, each with ``seed``, ``step`` and ``reason``.
    """

    loss: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    metrics: dict[str, Estimate]
    agreement: Estimate | None
    seconds_per_step: float | None
    seconds: float | None
    diverged: tuple[dict[str, Any], ...] = ()


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t-interval of independent values."""
    if len(values) < 2:
        return Estimate(fmean(values), None)
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return Estimate(fmean(values), float(half))


def summarise(results: Sequence[Result]) -> list[LossSummary]:
    """One summary per loss, in the order in which the losses first appear."""
    summaries = []
    for loss in dict.fromkeys(result.loss for result in results):
        runs = sorted((run for run in results if run.loss == loss), key=lambda run: run.seed)
        ended = [run for run in runs if not run.diverged]
        whole = ended if len(ended) == len(runs) else []
        agreements = [run.agreement for run in whole if run.agreement is not None]
        summaries.append(
            LossSummary(
                loss,
                tuple(run.seed for run in ended),
                tuple(run.score for run in ended),
                {
                    name: estimate([run.metrics[name] for run in whole])
                    for name in (whole[0].metrics if whole else ())
                },
                estimate(agreements) if agreements else None,
                fmean(run.seconds_per_step for run in ended) if ended else None,
                fmean(run.seconds for run in ended) if ended else None,
                tuple(
                    {"seed": run.seed, "step": run.steps, "reason": run.reason}
                    for run in runs
                    if run.diverged
                ),
            )
        )
    return summaries


def summary_json(teacher: Result, results: Sequence[Result]) -> dict[str, Any]:
    """The content of ``summary.json``."""
    return {
        "task": teacher.task,
        "headline": teacher.headline,
        "rows": teacher.rows,
        "interval": "half the width of the 95 % t-interval over seeds",
        "teacher": {
            "metrics": teacher.metrics,
            "seconds": teacher.seconds,
            "seconds_per_step": teacher.seconds_per_step,
        },
        "losses": [asdict(summary) for summary in summarise(results)],
        "versions": _distinct([run.versions for run in (teacher, *results)]),
        "machines": _distinct([run.machine for run in (teacher, *results)]),
    }


def _distinct(values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
