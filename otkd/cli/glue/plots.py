"""The plots of the page, as SVG that is the same for the same results."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from otkd.cli.glue.collect import BASELINE, Study, TaskResults
from otkd.cli.glue.departures import setting_name
from otkd.cli.glue.findings import curve, difference, inflation, references
from otkd.cli.report import metric_title
from otkd.cli.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), "Color Universal Design": told apart by the colour-blind.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
_MARKERS = "osD^vP*Xh"
_COLUMNS = 3
_WIDTH = 8.0
# Over a range wider than this, a setting is tried in ratios.
_LOG_RANGE = 4


def difference_plot(study: Study) -> bytes | None:
    """Each loss − the baseline with its interval, a panel a task; None without results."""
    losses = [loss for loss in study.protocol.losses if loss != BASELINE]
    shown = [
        (results, found)
        for results in study.tasks.values()
        if (found := [(n, d) for n, x in enumerate(losses) if (d := _to_baseline(results, x))])
    ]
    if not shown:
        return None
    figure, panels = _panels(len(shown), 0.9 + 0.24 * len(losses))
    for place, (axes, (results, found)) in enumerate(zip(panels, shown, strict=True)):
        axes.axvline(0, color="0.5", linewidth=1)
        for row, gap in found:
            kept = gap.interval is not None and abs(gap.mean) > gap.interval
            axes.errorbar(
                gap.mean * 100,
                row,
                xerr=None if gap.interval is None else gap.interval * 100,
                fmt="o" if kept else "s",
                markerfacecolor=_COLOURS[1] if kept else "white",
                color=_COLOURS[1] if kept else _COLOURS[0],
                capsize=3,
                markersize=5,
            )
        axes.set_ylim(len(losses) - 0.5, -0.5)
        titles = [study.title(loss) for loss in losses] if place % _COLUMNS == 0 else []
        axes.set_yticks(range(len(losses)), titles or [""] * len(losses))
        axes.set_title(results.task.title, fontsize=10)
        axes.set_xlabel(f"{metric_title(results.task.headline)} × 100", fontsize=9)
        axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    figure.suptitle(
        f"Difference to {study.title(BASELINE)}, mean and 95 % interval over shared seeds"
        " (filled: excludes 0)",
        fontsize=10,
    )
    return _svg(figure)


def inflation_plot(study: Study) -> bytes | None:
    """Best − last evaluation by task and loss; None without trainings evaluated more than once."""
    losses = list(study.protocol.losses)
    shown = [
        (results, found)
        for results in study.tasks.values()
        if (found := {loss: gain for loss in losses if (gain := inflation(results, loss))})
    ]
    if not shown:
        return None
    figure = _figure(3.8)
    axes = figure.add_subplot()
    for number, loss in enumerate(losses):
        places = [
            (place + 0.7 * ((number + 0.5) / len(losses) - 0.5), found[loss])
            for place, (_, found) in enumerate(shown)
            if loss in found
        ]
        if places:
            _points(axes, places, number, study.title(loss), line="")
    axes.axhline(0, color="0.5", linewidth=1)
    axes.set_xticks(range(len(shown)), [results.task.title for results, _ in shown])
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_ylabel("best − last evaluation, score × 100")
    axes.grid(axis="y", alpha=0.3, linewidth=0.5)
    axes.legend(fontsize=9, frameon=False, ncols=3)
    return _svg(figure)


def curve_plot(study: Study, name: str) -> bytes | None:
    """The headline score over a setting, a panel a task; None without results."""
    shown = [(x, series) for x in study.tasks.values() if (series := curve(study, x, name))]
    if not shown:
        return None
    figure, panels = _panels(len(shown), 2.9)
    titles = list(dict.fromkeys(title for _, series in shown for title in series))
    lines = list(dict.fromkeys(t for x, _ in shown for t in references(study, x, name)))
    for axes, (results, series) in zip(panels, shown, strict=True):
        for title, points in series.items():
            places = [(point.value, point.score) for point in points]
            _points(axes, places, titles.index(title), title, line="-")
        for title, score in references(study, results, name).items():
            colour = _COLOURS[(len(titles) + lines.index(title)) % len(_COLOURS)]
            axes.axhline(score.mean * 100, color=colour, linestyle="--", linewidth=1, label=title)
            if score.interval is not None:
                low, high = score.mean - score.interval, score.mean + score.interval
                axes.axhspan(low * 100, high * 100, color=colour, alpha=0.12, linewidth=0)
        _scale(axes, sorted({point.value for points in series.values() for point in points}))
        axes.set_title(results.task.title, fontsize=10)
        axes.set_xlabel(setting_name(name), fontsize=9)
        axes.set_ylabel(f"{metric_title(results.task.headline)} × 100", fontsize=9)
        axes.grid(alpha=0.3, linewidth=0.5)
    panels[0].legend(fontsize=8, frameon=False)
    return _svg(figure)


def _to_baseline(results: TaskResults, loss: str) -> Estimate | None:
    return difference(results, loss, BASELINE)


def _points(
    axes: Axes, places: Sequence[tuple[float, Estimate]], number: int, label: str, *, line: str
) -> None:
    """Means with intervals; where there is one seed, a mean alone."""
    axes.errorbar(
        [place for place, _ in places],
        [value.mean * 100 for _, value in places],
        yerr=[math.nan if v.interval is None else v.interval * 100 for _, v in places],
        fmt=_MARKERS[number % len(_MARKERS)] + line,
        color=_COLOURS[number % len(_COLOURS)],
        capsize=3,
        markersize=5,
        linewidth=1.2,
        label=label,
    )


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if values[0] > 0 and values[-1] / values[0] > _LOG_RANGE:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(values, [f"{value:g}" for value in values])


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = _figure(height * rows + 0.3)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _svg(figure: Figure) -> bytes:
    import matplotlib as mpl

    # Text stays text, and the same results are the same file.
    file = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "otkd"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib leaves spaces at the ends of lines, which formatters of a repository take out.
    lines = file.getvalue().decode().splitlines()
    return ("\n".join(line.rstrip() for line in lines) + "\n").encode()
