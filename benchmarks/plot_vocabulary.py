"""Draw docs/images/topk-error.svg from the row ``accuracy``: error of the gradient against k."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer
from problems import LOGITS
from run import RESULTS

mpl.use("Agg")
# Text stays text, and the same results are the same file.
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "otkd"})

import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "topk-error.svg"
_STYLES = {"iid": "-", "clustered": "--"}
_COLOURS = dict(zip(LOGITS, ("#1b6ca8", "#d1662a", "#5b8c3e"), strict=True))


def draw(result: dict, image: Path) -> None:
    """One curve for each kind of logits and of embedding."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for case in result["cases"]:
        logits, embedding = case["problem"]["logits"], case["problem"]["embedding"]
        curve = [point for point in case["curve"] if point["clusters"] == 1]
        divided = [point for point in case["curve"] if point["clusters"] > 1]
        axes.plot(
            [point["k"] for point in curve],
            [point["gradient_error"] for point in curve],
            _STYLES[embedding],
            color=_COLOURS[logits],
            marker="o",
            markersize=3.5,
            label=f"{logits}, {embedding} embedding (top 64: {case['coverage_of_64']:.0%})",
        )
        axes.scatter(
            [point["k"] for point in divided],
            [point["gradient_error"] for point in divided],
            s=[point["clusters"] / 2 for point in divided],
            facecolors="none" if embedding == "clustered" else _COLOURS[logits],
            edgecolors=_COLOURS[logits],
        )
    sizes = sorted({point["k"] for point in result["cases"][0]["curve"]})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(k) for k in sizes])
    axes.set_xlabel("k, tokens of each side")
    axes.set_ylabel("relative error of the logit gradient")
    vocab = result["cases"][0]["problem"]["vocab"]
    axes.set_title(
        f"TopK(k) against all of {vocab:,} tokens, ε = 0.1; circles: 16, 32, 64 tail atoms",
        fontsize=10,
    )
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(fontsize=7.5, frameon=False)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={"Date": None} if image.suffix == ".svg" else None)
    plt.close(figure)


def main(
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS / "vocabulary",
    image: Annotated[Path, typer.Option(help="Where to draw; .svg or .png.")] = IMAGE,
) -> None:
    """Read accuracy.json and draw it."""
    path = results / "accuracy.json"
    if not path.is_file():
        raise typer.BadParameter(
            f"{path} is not there; run `python benchmarks/run.py vocabulary --rows accuracy` first"
        )
    draw(json.loads(path.read_text("utf-8")), image)
    typer.echo(f"drawn: {image}")


if __name__ == "__main__":
    typer.run(main)
