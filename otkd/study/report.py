"""The table, the explanation and the plot of a comparison. None of them names a winner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from otkd.files import written_whole
from otkd.study.results import Result
from otkd.study.summary import Estimate, LossSummary, summarise
from otkd.tasks import LanguageTask, get_metric, get_task

_NONE = "–"
_AGREEMENT = "accuracy"  # it is shown like this metric


def metric_title(key: str) -> str:
    """A metric's name for readers: ``matched_accuracy`` is ``accuracy (matched)``."""
    return get_metric(key).title


def _scale(key: str) -> float:
    return 100.0 if get_metric(key).fraction else 1.0


def _shown(key: str, value: float) -> str:
    number, digits = (value * 100, 1) if get_metric(key).fraction else (value, 3)
    return f"{round(number, digits) + 0.0:.{digits}f}"  # −0.0 + 0.0 is 0.0


def comparison_table(teacher: Result, results: Sequence[Result]) -> Table:
    """The teacher, then each loss: mean ± 95 % interval over seeds; fractions are in percent."""
    task = get_task(teacher.task)
    unit = "nats; shares × 100" if isinstance(task, LanguageTask) else "scores × 100"
    table = Table(title=f"{task.title}: development {unit}", title_justify="left")
    table.add_column("loss", no_wrap=True)
    for heading in (*map(metric_title, teacher.metrics), "agreement", "s/step", "s/run"):
        table.add_column(heading, justify="right", no_wrap=True)
    trained = (teacher.seconds_per_step, teacher.seconds) if teacher.steps else (None, None)
    table.add_row(
        "teacher",
        *(_shown(name, value) for name, value in teacher.metrics.items()),
        _NONE,
        *_times(*trained),
        end_section=True,
    )
    for summary in summarise(results):
        scores = [_estimate(name, value) for name, value in summary.metrics.items()]
        if summary.diverged:
            scores = [_diverged(summary), *[_NONE] * (len(teacher.metrics) - 1)]
        agreement = _NONE
        if summary.agreement is not None:
            agreement = _estimate(_AGREEMENT, summary.agreement)
        times = _times(summary.seconds_per_step, summary.seconds)
        table.add_row(summary.loss, *scores, agreement, *times)
    return table


def explanation(teacher: Result, results: Sequence[Result]) -> str:
    """The meaning of the numbers in a few sentences."""
    summaries = summarise(results)
    counts = sorted({len(each.seeds) + len(each.diverged) for each in summaries})
    settings, epochs = results[0].settings, results[0].settings["epochs"]
    sentences = [
        f"{' or '.join(map(str, counts))} {'seed' if counts == [1] else 'seeds'} per loss, "
        f"{teacher.rows['train']:,} training and {teacher.rows['dev']:,} development rows, "
        f"{epochs} {'epoch' if epochs == 1 else 'epochs'}, {results[0].precision}.",
        "± is half the width of the 95 % t-interval over seeds"
        + (" (– for one seed)." if counts[0] == 1 else "."),
        *_divergence(summaries),
        *_objective(results),
        _agreement(teacher),
        *_rouge(teacher),
    ]
    if settings["freeze_embeddings"]:
        sentences.append("The embeddings were not trained (--no-freeze-embeddings trains them).")
    if len({tuple(run.versions.items()) for run in (teacher, *results)}) > 1:
        sentences.append("The runs were made with different versions; each result has its own.")
    return " ".join(sentences)


def _divergence(summaries: Sequence[LossSummary]) -> list[str]:
    found = [
        f"{each.loss}, seed {run['seed']}, after {run['step']} steps ({run['reason']})"
        for each in summaries
        for run in each.diverged
    ]
    if not found:
        return []
    shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    return [f"Diverged: {shown}. Such a loss has no mean over its other seeds."]


def _diverged(summary: LossSummary) -> str:
    total = len(summary.seeds) + len(summary.diverged)
    return f"{len(summary.diverged)} of {total} diverged"


def _objective(results: Sequence[Result]) -> list[str]:
    """The weights of losses and hard labels, from the settings in the result files."""
    own = {"ce": "ce is used alone", "sinkd": "sinkd has a ce term of its own"}
    own["seqkd"] = "seqkd is ce with the teacher's own answers"
    used = {run.settings["loss"] for run in results if run.settings.get("loss.alpha") != 1}
    weights = {run.settings["loss.alpha"] for run in results if run.settings["loss"] not in own}
    if not weights:
        return []
    shares = " or ".join(
        "the loss alone" if w == 1 else f"{w:g} · loss + {1 - w:g} · ce" for w in sorted(weights)
    )
    meaning = "" if weights == {1} else ", where ce is the cross-entropy with the labels"
    sentences = [f"Objective: {shares}{meaning}."]
    if exceptions := [text for name, text in own.items() if name in used]:
        sentences.append(f"{'; '.join(exceptions)}.")
    return sentences


def save_plot(path: Path, teacher: Result, results: Sequence[Result]) -> None:
    """Plot a point per seed, mean and interval per loss, and the teacher's score as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summaries = summarise(results)
    figure = Figure(figsize=(1.8 + 0.9 * len(summaries), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scale = _scale(teacher.headline)
    axes.axhline(teacher.score * scale, color="0.4", linestyle="--", linewidth=1, label="teacher")
    for place, summary in enumerate(summaries):
        points = [score * scale for score in summary.scores]
        axes.plot([place] * len(points), points, "o", color="C0", alpha=0.45, markersize=5)
        mean = summary.metrics.get(teacher.headline)
        if mean is not None:
            half = None if mean.interval is None else mean.interval * scale
            style = {"fmt": "D", "color": "C1", "capsize": 4, "markersize": 5}
            axes.errorbar(place + 0.18, mean.mean * scale, yerr=half, **style)
    # Empty series for the legend: one entry each, however many losses there are.
    axes.plot([], [], "o", color="C0", alpha=0.45, label="seed")
    axes.plot([], [], "D", color="C1", label="mean, 95 % t-interval")
    names = [
        f"{each.loss}\n{_diverged(each)}" if each.diverged else each.loss for each in summaries
    ]
    axes.set_xticks(range(len(summaries)), names)
    axes.set_xlim(-0.5, len(summaries) - 0.3)
    unit = " × 100" if scale == 100 else ""
    axes.set_ylabel(metric_title(teacher.headline) + unit)
    axes.set_title(get_task(teacher.task).title)
    axes.legend(fontsize="small")
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _agreement(teacher: Result) -> str:
    if "bits_per_byte" in teacher.metrics:
        return (
            "Bits per byte are those of the texts. The next byte is compared at the positions that "
            "both tokenizers share. Agreement: share of them for which student and teacher have "
            "the same most probable one."
        )
    if isinstance(get_task(teacher.task), LanguageTask):
        return (
            "Means over all tokens that are predicted. Agreement: share of them for which student "
            "and teacher have the same most probable token."
        )
    return (
        "Agreement: share of development rows for which student and teacher predict the same class."
    )


def _rouge(teacher: Result) -> list[str]:
    if "rouge_l" not in teacher.metrics:
        return []
    seed = teacher.settings["rouge_seed"]
    how = "the most probable tokens" if seed is None else f"tokens sampled with seed {seed}"
    return [
        f"Rouge-L: of answers of at most {teacher.settings['answer_tokens']} tokens to "
        f"{teacher.settings['rouge_rows']} development prompts, {how}, after the last step."
    ]


def _estimate(key: str, value: Estimate) -> str:
    interval = _NONE if value.interval is None else _shown(key, value.interval)
    return f"{_shown(key, value.mean)} ± {interval}"


def _times(per_step: float | None, total: float | None) -> tuple[str, str]:
    return (
        _NONE if per_step is None else f"{per_step:.3f}",
        _NONE if total is None else f"{total:.1f}",
    )
