"""Writes the tables of docs/causal_lm.md and docs/two_tokenizers.md from the result files.

    python examples/causal_lm/study/study_tables.py

The results of `otkd compare … --protocol examples/causal_lm/study/PROTOCOL.toml` are read from
`examples/causal_lm/study/results/PROTOCOL/TASK/LOSS/SEED.json`. The pages are written by hand,
except what is between the two comments of each table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from otkd.files import written_whole
from otkd.study.protocols import load_protocol
from otkd.study.report import metric_title
from otkd.study.results import Result, read_result
from otkd.study.summary import Estimate, estimate
from otkd.tasks import get_metric

HERE = Path(__file__).parent
PAGES = [HERE.parents[2] / "docs" / name for name in ("causal_lm.md", "two_tokenizers.md")]
BASELINE = "kl"
METRICS = ("cross_entropy", "kl", "reverse_kl", "tvd", "sinkhorn", "accuracy", "rouge_l")
METRICS += ("bits_per_byte", "next_byte_kl")  # with two tokenizers
_TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Runs = Mapping[str, Mapping[int, Result]]


def read_runs(folder: Path, losses: list[str]) -> dict[str, dict[int, Result]]:
    """The finished results of every loss by seed, in the order of the protocol."""
    found = {}
    for loss in losses:
        results = [read_result(path) for path in sorted((folder / loss).glob("*.json"))]
        if results:
            found[loss] = {result.seed: result for result in results}
    return found


def table(folder: Path, protocol: str) -> str:
    """Means over seeds, and the difference of the main metric to KL in pairs of equal seeds."""
    runs = read_runs(folder, [*load_protocol(str(HERE / f"{protocol}.toml")).losses])
    teacher = read_result(folder / "teacher" / "result.json")
    metrics = [name for name in METRICS if name in teacher.metrics]
    difference = f"{metric_title(teacher.headline)} − KL’s"
    header = ["loss", "seeds", *map(metric_title, metrics), "agreement", difference]
    rows = [
        ["teacher", "", *(_shown(name, teacher.metrics[name]) for name in metrics), "", ""],
        *(_row(loss, runs, metrics) for loss in runs),
    ]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _row(loss: str, runs: Runs, metrics: list[str]) -> list[str]:
    results = [*runs[loss].values()]
    if any(result.diverged for result in results):
        return [loss, str(len(results)), "diverged", *[""] * (len(metrics) + 1)]
    means = [
        _mean(name, estimate([result.metrics[name] for result in results])) for name in metrics
    ]
    agreement = _mean("accuracy", estimate([result.agreement or 0.0 for result in results]))
    return [loss, str(len(results)), *means, agreement, _difference(loss, runs)]


def _difference(loss: str, runs: Runs) -> str:
    """Bold if the interval excludes 0; without an interval for a single seed."""
    baseline = runs.get(BASELINE, {})
    common = [seed for seed in runs[loss] if seed in baseline]
    if loss == BASELINE or not common:
        return ""
    found = estimate([runs[loss][seed].score - baseline[seed].score for seed in common])
    text = f"{found.mean:+.3f}".replace("-", "−")
    if found.interval is None:
        return text
    text = f"{text} ± {found.interval:.3f}"
    return f"**{text}**" if abs(found.mean) > found.interval else text


def _mean(name: str, found: Estimate) -> str:
    text = _shown(name, found.mean)
    return text if found.interval is None else f"{text} ± {_shown(name, found.interval)}"


def _shown(name: str, value: float) -> str:
    digits, scale = (1, 100) if get_metric(name).fraction else (3, 1)
    return f"{round(scale * value, digits) + 0.0:.{digits}f}"  # without the sign of −0


def updated(page: str, results: Path) -> str:
    """The page with its tables made anew."""

    def made(match: re.Match) -> str:
        start, protocol, task, end = match.groups()
        return start + table(results / protocol / task, protocol) + end

    return _TABLE.sub(made, page)


def main(
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = HERE / "results",
) -> None:
    for page in PAGES:
        text = updated(page.read_text(encoding="utf-8"), results)
        with written_whole(page) as partial:
            partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
