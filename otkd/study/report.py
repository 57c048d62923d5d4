"""The table and the plot of a comparison. Neither names a winner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from otkd.files import written_whole
from otkd.study.results import Result
from otkd.study.stats import Estimate, LossSummary, summarise
from otkd.tasks import get_task

_METRIC_TITLES = {"accuracy": "accuracy", "f1": "F1", "mcc": "MCC"}


def metric_title(key: str) -> str:
    """A metric's name for readers: ``matched_accuracy`` is ``accuracy (matched)``."""
    split, _, metric = key.rpartition("_")
    title = _METRIC_TITLES[metric]
    return f"{title} ({split})" if split else title


def comparison_table(teacher: Result, results: Sequence[Result]) -> Table:
    """The teacher, then each loss: mean ± 95 % interval over seeds, all in percent."""
    summaries = summarise(results)
    table = Table(
        title=f"{get_task(teacher.task).title}: development scores × 100",
        title_justify="left",
    )
    table.add_column("loss", no_wrap=True)
    for key in teacher.metrics:
        table.add_column(metric_title(key), justify="right", no_wrap=True)
    for heading in ("agreement", "s/step", "s/run"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row(
        "teacher",
        *(f"{value * 100:.1f}" for value in teacher.metrics.values()),
        "–",
        f"{teacher.seconds_per_step:.3f}" if teacher.steps else "–",
        f"{teacher.seconds:.1f}" if teacher.steps else "–",
        end_section=True,
    )
    for summary in summaries:
        scores = [_percent(value) for value in summary.metrics.values()]
        if summary.diverged:
            scores = [_diverged(summary), *["–"] * (len(teacher.metrics) - 1)]
        table.add_row(
            summary.loss,
            *scores,
            "–" if summary.agreement is None else _percent(summary.agreement),
            "–" if summary.seconds_per_step is None else f"{summary.seconds_per_step:.3f}",
            "–" if summary.seconds is None else f"{summary.seconds:.1f}",
        )
    return table


def explanation(teacher: Result, results: Sequence[Result]) -> str:
    """What the numbers are, in a few sentences."""
    summaries = summarise(results)
    seeds = {each.loss: len(each.seeds) + len(each.diverged) for each in summaries}
    counts = sorted(set(seeds.values()))
    count = " or ".join(map(str, counts))
    settings = results[0].settings
    sentences = [
        f"{count} {'seed' if counts == [1] else 'seeds'} a loss, {teacher.rows['train']:,} training"
        f" and {teacher.rows['dev']:,} development rows, {_epochs(settings['epochs'])},"
        f" {results[0].precision}.",
        "± is the half-width of the 95 % t-interval over seeds"
        + (" (– with one seed)." if counts[0] == 1 else "."),
        *_divergence(summaries),
        *_objective(results),
        "Agreement: development rows on which student and teacher choose the same class.",
    ]
    if settings["freeze_embeddings"]:
        sentences.append("The embeddings were kept frozen (--no-freeze-embeddings trains them).")
    if len({tuple(run.versions.items()) for run in (teacher, *results)}) > 1:
        sentences.append("The runs were made with different versions; each file has its own.")
    return " ".join(sentences)


def _divergence(summaries: Sequence[LossSummary]) -> list[str]:
    """Which runs diverged, and what that means for the table."""
    found = [
        f"{each.loss}, seed {run['seed']}, after {run['step']} steps ({run['reason']})"
        for each in summaries
        for run in each.diverged
    ]
    if not found:
        return []
    shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    return [f"Diverged: {shown}. No mean is given over the other seeds of such a loss."]


def _diverged(summary: LossSummary) -> str:
    total = len(summary.seeds) + len(summary.diverged)
    return f"{len(summary.diverged)} of {total} diverged"


def _objective(results: Sequence[Result]) -> list[str]:
    """How losses and hard labels were weighed, as the result files have it."""
    sentences = []
    shared = [run for run in results if run.settings["loss"] not in ("ce", "sinkd")]
    weights = {run.settings["loss.alpha"] for run in shared}
    if weights:
        shares = " or ".join(f"{w:g} · loss + {1 - w:g} · ce" for w in sorted(weights))
        sentences.append(f"Objective: {shares}, where ce is the cross-entropy to the labels.")
    own = [name for name in ("ce", "sinkd") if any(run.settings["loss"] == name for run in results)]
    if weights and own:
        alone = {"ce": "ce is that alone", "sinkd": "sinkd has a ce term of its own"}
        sentences.append(f"{'; '.join(alone[name] for name in own)}.")
    return sentences


def save_plot(path: Path, teacher: Result, results: Sequence[Result]) -> None:
    """Draw a point per seed, mean and interval per loss, and the teacher's line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summaries = summarise(results)
    figure = Figure(figsize=(1.8 + 0.9 * len(summaries), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(teacher.score * 100, color="0.4", linestyle="--", linewidth=1, label="teacher")
    for place, summary in enumerate(summaries):
        points = [score * 100 for score in summary.scores]
        axes.plot([place] * len(points), points, "o", color="C0", alpha=0.45, markersize=5)
        mean = summary.metrics.get(teacher.headline)
        if mean is None:
            continue
        axes.errorbar(
            place + 0.18,
            mean.mean * 100,
            yerr=None if mean.interval is None else mean.interval * 100,
            fmt="D",
            color="C1",
            capsize=4,
            markersize=5,
        )
    # Stand-ins for the legend: one point and one mean, however many losses there are.
    axes.plot([], [], "o", color="C0", alpha=0.45, label="seed")
    axes.plot([], [], "D", color="C1", label="mean, 95 % t-interval")
    names = [
        f"{each.loss}\n{_diverged(each)}" if each.diverged else each.loss for each in summaries
    ]
    axes.set_xticks(range(len(summaries)), names)
    axes.set_xlim(-0.5, len(summaries) - 0.3)
    axes.set_ylabel(f"{metric_title(teacher.headline)} × 100")
    axes.set_title(get_task(teacher.task).title)
    axes.legend(fontsize="small")
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _percent(value: Estimate) -> str:
    interval = "–" if value.interval is None else f"{value.interval * 100:.1f}"
    return f"{value.mean * 100:.1f} ± {interval}"


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"
