"""The figures of the benchmark pages, drawn from result files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import files
import matplotlib as mpl

mpl.use("Agg")
# Text is kept as text, and the same results give the same file.
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "otkd"})

import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

_COLOURS = ("#1b6ca8", "#d1662a", "#5b8c3e", "#8a4f9e", "#a33b3b", "#555555")
_STYLES = {"iid": "-", "clustered": "--"}


def topk_error(result: dict) -> Figure:
    """Error of the gradient of TopK against k: a curve for each kind of logits and embedding."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    kinds = dict.fromkeys(case["problem"]["logits"] for case in result["cases"])
    colours = dict(zip(kinds, _COLOURS, strict=False))
    for case in result["cases"]:
        logits, embedding = case["problem"]["logits"], case["problem"]["embedding"]
        points = [point for point in case["points"] if point["clusters"] == 1]
        divided = [point for point in case["points"] if point["clusters"] > 1]
        axes.plot(
            [point["k"] for point in points],
            [point["gradient_error"] for point in points],
            _STYLES[embedding],
            color=colours[logits],
            marker="o",
            markersize=3.5,
            label=f"{logits}, {embedding} embedding (top 64: {case['coverage_of_64']:.0%})",
        )
        axes.scatter(
            [point["k"] for point in divided],
            [point["gradient_error"] for point in divided],
            s=[point["clusters"] / 2 for point in divided],
            facecolors="none" if embedding == "clustered" else colours[logits],
            edgecolors=colours[logits],
        )
    sizes = sorted({point["k"] for point in result["cases"][0]["points"]})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(k) for k in sizes])
    axes.set_xlabel("k, tokens of each side")
    axes.set_ylabel("relative error of the logit gradient")
    vocab = result["cases"][0]["problem"]["vocab"]
    title = f"TopK(k) against all of {vocab:,} tokens, ε = 0.1; circles: 16, 32, 64 tail atoms"
    axes.set_title(title, fontsize=10)
    _finish(axes)
    return figure


def scaling(result: dict) -> Figure:
    """Time of batch transport over b, d and T, with the fitted exponents."""
    panels = {"b": "samples b", "d": "classes d", "T": "iterations T"}
    figure, all_axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for axes, (axis, label) in zip(all_axes, panels.items(), strict=True):
        cases = [case for case in result["cases"] if case["name"].endswith(f" over {axis}")]
        for case, colour in zip(cases, _COLOURS, strict=False):
            fit = case["exponent"]
            times = [point["seconds"] for point in case["points"]]
            sizes, medians = [p[axis] for p in case["points"]], [t["median"] for t in times]
            name = case["name"].removesuffix(f" over {axis}")
            power = f"{fit['exponent']:.2f} ± {fit['interval']:.2f}"
            label_of = f"{name}: {axis}^({power})"
            axes.plot(sizes, medians, "o-", color=colour, markersize=3.5, label=label_of)
            low, high = ([t[end] for t in times] for end in ("low", "high"))
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(label)
        _finish(axes)
    all_axes[0].set_ylabel("seconds, value and gradient")
    return figure


def pareto(result: dict) -> Figure:
    """Error of the gradient against time: a panel for each ε, a curve for each method."""
    cases = result["cases"]
    size = (3.6 * len(cases) + 1, 4)
    figure, all_axes = plt.subplots(
        1, len(cases), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, case in zip(all_axes[0], cases, strict=True):
        families = list(dict.fromkeys(point["family"] for point in case["points"]))
        for family, colour in zip(families, _COLOURS, strict=False):
            points = [point for point in case["points"] if point["family"] == family]
            axes.plot(
                [point["seconds"]["median"] for point in points],
                [point["gradient_error"] for point in points],
                "o-" if family.startswith("otkd") else "s--",
                color=colour,
                markersize=4,
                linewidth=1,
                label=family,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("seconds, value and gradient")
        axes.set_title(case["name"], fontsize=10)
        _finish(axes)
    all_axes[0][0].set_ylabel("relative error of the logit gradient")
    return figure


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(fontsize=7, frameon=False)


FIGURES: dict[str, tuple[Callable[[dict], Figure], str]] = {
    "vocabulary/accuracy": (topk_error, "topk-error.svg"),
    "batch/scaling": (scaling, "batch-scaling.svg"),
    "pareto/vocabulary": (pareto, "pareto-vocabulary.svg"),
    "pareto/batch": (pareto, "pareto-batch.svg"),
}


def draw_all(results: Path, images: Path) -> None:
    """Draw the figures of all rows that were measured."""
    images.mkdir(parents=True, exist_ok=True)
    for place, (draw, name) in FIGURES.items():
        result = files.read(results / f"{place}.json")
        if result.get("measured"):
            figure = draw(result)
            figure.savefig(images / name, metadata={"Date": None})
            plt.close(figure)
