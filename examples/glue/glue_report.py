"""Writes the tables and plots of docs/glue.md from the result files of the GLUE protocols.

    python examples/glue/glue_report.py
    python examples/glue/glue_report.py --results results --page my_glue.md

The page holds hand-written text; only what stands between `<!-- table: NAME -->` and `<!-- end -->`
is replaced. A page that does not exist yet gets every table. Results are those of
`otkd compare TASK --protocol author` (or fair, sensitivity). Needs the `train` extra, as that does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import glue_records
import glue_tables
import matplotlib as mpl
import typer
from glue_results import BASELINE, Study, difference, read_studies
from matplotlib.figure import Figure

from otkd.files import written_whole
from otkd.study.messages import StudyError
from otkd.study.report import metric_title
from otkd.tasks import DataError

ROOT = Path(__file__).resolve().parents[2]
_MARKED = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_COLOURS = ("#0072b2", "#d55e00")  # told apart by the colour-blind (Okabe and Ito)


def tables(root: Path, studies: Mapping[str, Study]) -> dict[str, str]:
    """Every table of the page by name."""
    made = {
        table.__name__.replace("_", "-"): table(studies)
        for table in (*glue_tables.TABLES, glue_records.runs)
    }
    made["missing"] = glue_records.missing(studies, root)
    made["commands"] = glue_records.commands(root)
    made["gradients"] = glue_records.gradients(root)
    for name, study in studies.items():
        if study.protocol.tuning:
            made[f"candidates-{name}"] = glue_records.candidates(study)
    return made


def fill(page: str, made: dict[str, str]) -> str:
    """The page with the tables between its markers.

    Raises:
        StudyError: if the markers are not those of the tables, each once.
    """
    names = [match[1] for match in _MARKED.finditer(page)]
    if sorted(names) != sorted(made):
        differing = sorted({*names} ^ {*made} or {n for n in names if names.count(n) > 1})
        raise StudyError(
            "The page must have each table between its markers, <!-- table: NAME --> and "
            f"<!-- end -->, once. Missing, unknown or repeated: {', '.join(differing)}."
        )
    return _MARKED.sub(lambda match: _marked(match[1], made[match[1]]), page)


def _marked(name: str, table: str) -> str:
    return f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->"


def plot(study: Study) -> Figure:
    """Each loss − KL with its interval, a panel per task."""
    losses = [loss for loss in study.protocol.losses if loss != BASELINE]
    titles = [study.title(loss) for loss in losses]
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(study.tasks), sharey=True, squeeze=False).ravel()
    for axes, task in zip(panels, study.tasks, strict=True):
        scores = study.scores(task)
        for title, loss in zip(titles, losses, strict=True):
            found = difference(scores, loss, BASELINE)
            if found is not None:
                colour = _COLOURS[found.significant]
                face = colour if found.significant else "white"
                style = {"color": colour, "markerfacecolor": face, "capsize": 3}
                axes.errorbar(found.mean, title, xerr=found.half, fmt="o", **style)
        axes.axvline(0, color="0.5", linewidth=1)
        axes.set_title(task.title, fontsize=10)
        axes.set_xlabel(f"{metric_title(task.headline)} × 100", fontsize=9)
        axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    panels[0].invert_yaxis()
    figure.suptitle("Difference to KL, 95 % interval (filled: excludes 0)", fontsize=10)
    return figure


def save(figure: Figure, path: Path, description: str) -> None:
    """Write an SVG that is the same for the same results, with its text as text."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "otkd"}
    with mpl.rc_context(style), written_whole(path) as partial:
        about = {"Description": description, "Date": None, "Creator": None}
        figure.savefig(partial, format="svg", metadata=about)
        # matplotlib leaves spaces at the ends of lines, which a repository's hooks remove.
        lines = partial.read_text(encoding="utf-8").splitlines()
        partial.write_text("\n".join(map(str.rstrip, lines)) + "\n", encoding="utf-8")


def main(
    results: Annotated[
        Path, typer.Option(help="Where `otkd compare --protocol …` wrote its results.")
    ] = ROOT / "benchmarks" / "results" / "glue",
    page: Annotated[
        Path, typer.Option(help="The page; its plots go to the folder images beside it.")
    ] = ROOT / "docs" / "glue.md",
    protocols: Annotated[
        Path | None,
        typer.Option(help="A folder with the files of the protocols, if they are not otkd's."),
    ] = None,
) -> None:
    """Write the tables of the page and its plots."""
    try:
        studies = read_studies(results, protocols)
        made = tables(results, studies)
        text = page.read_text(encoding="utf-8") if page.exists() else _new_page(made)
        text = fill(text, made)
    except (StudyError, DataError) as error:
        sys.exit(f"Error: {error}")
    with written_whole(page) as partial:
        partial.write_text(text, encoding="utf-8")
    if studies["fair"].tasks:
        # With its numbers in the plot, a test can tell whether it is that of the results.
        save(plot(studies["fair"]), page.parent / "images" / "glue-fair.svg", made["fair"])


def _new_page(made: dict[str, str]) -> str:
    return "\n\n".join(f"## {name}\n\n{_marked(name, '')}" for name in made) + "\n"


if __name__ == "__main__":
    typer.run(main)
