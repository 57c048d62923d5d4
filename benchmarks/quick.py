"""A few ratios measured again and compared with those on file: `make bench-quick`.

Ratios are peer ÷ otkd: above 1, otkd is faster. They depend less on the machine than times do; one
that changed by more than half is marked. Nothing fails here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import files
import machine
import measure
import torch
import typer
from batch_peers import BatchCall, BatchPeer, BatchSpec
from peers import Peer, prepare
from problems import Spec
from rich.console import Console
from rich.table import Table

SPEC = Spec(32_000, 64, 64, "zipf", "clustered")
BATCH = BatchSpec(256, 2)
_FILE = files.RESULTS / "quick.json"
# Peer ÷ otkd: the peer comes first.
PAIRS: dict[str, tuple[Callable[[], measure.Call], Callable[[], measure.Call]]] = {
    "F.kl_div ÷ KLLoss": (
        lambda: prepare(Peer("", "kl_div"), SPEC),
        lambda: prepare(Peer("", "otkd", {"loss": "KLLoss"}), SPEC),
    ),
    "plain formula ÷ JSDLoss": (
        lambda: prepare(Peer("", "plain", {"divergence": "JSDLoss"}), SPEC),
        lambda: prepare(Peer("", "otkd", {"loss": "JSDLoss"}), SPEC),
    ),
    "F.kl_div ÷ SinkhornLoss, top 64": (
        lambda: prepare(Peer("", "kl_div"), SPEC),
        lambda: prepare(Peer("", "otkd_sinkhorn", {"k": 64}), SPEC),
    ),
    "20 unrolled iterations ÷ BatchSinkhornLoss, b = 256": (
        lambda: BatchCall(BatchPeer("", "unrolled", {"iterations": 20}), BATCH),
        lambda: BatchCall(BatchPeer("", "otkd"), BATCH),
    ),
}


def ratios(repeats: int) -> dict[str, float]:
    """The median ratio of every pair."""
    found = {}
    for name, pair in PAIRS.items():
        calls = dict(zip(("theirs", "ours"), (make() for make in pair), strict=True))
        with measure.without_warnings():
            seconds = measure.alternate(calls, dict.fromkeys(calls, repeats))
        found[name] = measure.ratio(seconds["theirs"], seconds["ours"])["median"]
    return found


def read(file: Path) -> dict[str, float]:
    """The ratios on file; none if there is no file."""
    if not file.is_file():
        return {}
    try:
        return {name: float(x) for name, x in json.loads(file.read_text("utf-8"))["ratios"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise typer.BadParameter(f"{file} holds no ratios: {error!r}; delete it") from error


def main(
    repeats: Annotated[int, typer.Option(help="How often each is timed.", min=1)] = 7,
    keep: Annotated[bool, typer.Option(help="Write the new ratios to the file.")] = False,
    file: Annotated[Path, typer.Option(help="The ratios on file.")] = _FILE,
) -> None:
    """Measure, print, and with --keep write."""
    on_file = read(file)
    found = ratios(repeats)
    table = Table(title="time, peer ÷ otkd")
    for column in ("", "on file", "now"):
        table.add_column(column, justify="left" if not column else "right")
    for name, ratio in found.items():
        before = on_file.get(name)
        moved = before is not None and not 2 / 3 < ratio / before < 3 / 2
        known = "–" if before is None else f"{before:.2f}"
        table.add_row(name, known, f"{ratio:.2f}{'  moved' if moved else ''}")
    Console(width=100).print(table)
    if keep:
        where = {"machine": machine.hardware(), "versions": machine.versions()}
        files.write(file, {"ratios": found, "repeats": repeats, **where})


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
