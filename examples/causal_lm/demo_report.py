"""The report of the demo: a table, sample continuations and an explanation, printed and written."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

from demo_distillation import BATCH, EXPLAINED, EXPLAINED_PRICE, SEED, Demo
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from otkd.cli.console import out
from otkd.files import write_json, written_whole
from otkd.study.provenance import machine, versions

_WIDTH = 110


def show(demo: Demo) -> None:
    """Print the report."""
    out.print(_report(demo))


def write(demo: Demo, folder: Path) -> None:
    """Write the report as ``report.txt`` and its numbers as ``results.json``."""
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(_report(demo))
    with written_whole(folder / "report.txt") as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")
    content = {**asdict(demo), "versions": versions(), "machine": machine()}
    write_json(folder / "results.json", content)


def _report(demo: Demo) -> Group:
    continuations = [
        f"{name}:  …{' '.join(model['continuation'].split())}"
        for name, model in demo.models.items()
    ]
    return Group(
        _table(demo),
        Text(_note(demo) + "\n"),
        Text(f"“{demo.prompt} …” is continued, with the most probable token each time, by", "bold"),
        Text("\n".join(continuations) + "\n"),
        Text(
            f"TransportKLLoss for the token after this prompt ({EXPLAINED}), at a price of "
            f"{EXPLAINED_PRICE:g}: which mass of the student (from) stands for which token of the "
            "teacher (to)",
            "bold",
        ),
        Text(demo.explanation),
        Text(
            "Moved mass stands for another token. Training used the default price of 30, at which "
            "almost none moves and the loss is nearly KL."
        ),
    )


def _table(demo: Demo) -> Table:
    table = Table(title="Held-out IMDB reviews")
    table.add_column("", no_wrap=True)
    for title in (
        "cross-entropy", "KL to teacher", "agreement", "s/step", "peak memory"
    ):  # fmt: skip
        table.add_column(title, justify="right", no_wrap=True)
    for name, model in demo.models.items():
        seconds, peak = model.get("seconds_per_step"), model.get("peak_bytes")
        table.add_row(
            name,
            f"{model['cross_entropy']:.2f}",
            f"{model['kl']:.2f}",
            f"{model['agreement']:.1%}",
            "–" if seconds is None else f"{seconds:.2f}",
            "–" if peak is None else f"{peak / 2**30:.1f} GiB",
        )
    return table


def _note(demo: Demo) -> str:
    sizes = demo.sizes
    return (
        f"A demonstration, not a comparison of losses: one seed ({SEED}) and {sizes.steps} steps "
        f"of {BATCH} × {sizes.length} tokens for each student, measured on {sizes.held_out} "
        "reviews. Small differences between students may be chance, and all of them would need far "
        "more text to write well. KL to teacher is over all tokens, in nats. Agreement is the "
        "share of positions where both have the same most probable token. Peak memory is that of "
        "the whole process during training: it includes the teacher and memory that earlier parts "
        "left behind, so small "
        f"differences mean little. The demo took {demo.seconds / 60:.1f} minutes."
    )
