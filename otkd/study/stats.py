"""The numbers of a comparison, from its result files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from otkd.study.results import Result


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``interval`` is half the width of its 95 % t-interval.

    The interval covers the variation between seeds (head, dropout, data order), not that between
    samples of the task. With one seed it is None.
    """

    mean: float
    interval: float | None


@dataclass(frozen=True)
class LossSummary:
    """One loss over its seeds; metrics and agreement are fractions of one.

    Attributes:
        loss: its name.
        seeds: those whose training came to its end.
        scores: the headline number of each of them.
        metrics: mean and interval over all seeds; none where a seed diverged, as the mean of the
            others would be that of a selection.
        agreement: likewise.
        seconds_per_step: mean over the seeds that came to their end, or None.
        seconds: likewise.
        diverged: the other seeds, each with the ``step`` and the ``reason``.
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
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(values) - 1, 0.975))
    return Estimate(fmean(values), quantile * stdev(values) / math.sqrt(len(values)))


def summarise(results: Sequence[Result]) -> list[LossSummary]:
    """One summary a loss, in the order in which the losses first appear."""
    summaries = []
    for loss in dict.fromkeys(result.loss for result in results):
        runs = sorted((run for run in results if run.loss == loss), key=lambda run: run.seed)
        ended = [run for run in runs if not run.diverged]
        whole = ended if len(ended) == len(runs) else []
        agreements = [run.agreement for run in whole if run.agreement is not None]
        names = whole[0].metrics if whole else ()
        summaries.append(
            LossSummary(
                loss,
                tuple(run.seed for run in ended),
                tuple(run.score for run in ended),
                {name: estimate([run.metrics[name] for run in whole]) for name in names},
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
    """What ``summary.json`` holds."""
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
