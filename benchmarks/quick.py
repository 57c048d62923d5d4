"""A handful of ratios measured again, beside those on file: `make bench-quick`.

Times depend on the machine, ratios less so; a ratio that moved by more than half is worth a look.
Nothing fails here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import measure
import torch
import typer
from batch_peers import BatchCall, BatchPeer, BatchSpec
from peers import Peer, prepare
from problems import Spec
from rich.console import Console
from rich.table import Table
from run import RESULTS

SPEC = Spec(32_000, 64, 64, "zipf", "clustered")
BATCH = BatchSpec(256, 2)
_FILE = RESULTS / "quick.json"
# Ours over theirs.
PAIRS: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "KLLoss / F.kl_div": (
        lambda: prepare(Peer("", "otkd", {"loss": "KLLoss"}), SPEC),
        lambda: prepare(Peer("", "kl_div"), SPEC),
    ),
    "JSDLoss / plain formula": (
        lambda: prepare(Peer("", "otkd", {"loss": "JSDLoss"}), SPEC),
        lambda: prepare(Peer("", "plain", {"divergence": "JSDLoss"}), SPEC),
    ),
    "SinkhornLoss, top 64 / F.kl_div": (
        lambda: prepare(Peer("", "otkd_sinkhorn", {"k": 64}), SPEC),
        lambda: prepare(Peer("", "kl_div"), SPEC),
    ),
    "BatchSinkhornLoss / 20 unrolled iterations, b = 256": (
        lambda: BatchCall(BatchPeer("", "otkd"), BATCH),
        lambda: BatchCall(BatchPeer("", "unrolled", {"iterations": 20}), BATCH),
    ),
}


def ratios(repeats: int) -> dict[str, float]:
    """The median ratio of every pair."""
    found = {}
    for name, pair in PAIRS.items():
        calls = dict(zip(("ours", "theirs"), (make() for make in pair), strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds = measure.alternate(calls, dict.fromkeys(calls, repeats))
        found[name] = measure.ratio(seconds["ours"], seconds["theirs"])["median"]
    return found


def read(file: Path) -> dict[str, float]:
    """The ratios on file; none where there is no file."""
    if not file.is_file():
        return {}
    try:
        return {name: float(x) for name, x in json.loads(file.read_text("utf-8"))["ratios"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise typer.BadParameter(f"{file} holds no ratios: {error!r}; delete it") from error


def main(
    repeats: Annotated[int, typer.Option(help="How often each is timed.", min=1)] = 7,
    keep: Annotated[bool, typer.Option(help="Put what was measured on file.")] = False,
    file: Annotated[Path, typer.Option(help="The ratios on file.")] = _FILE,
) -> None:
    """Measure, print, and with --keep write."""
    on_file = read(file)
    found = ratios(repeats)
    table = Table(title="time of otkd over that of the other")
    for column in ("", "on file", "now"):
        table.add_column(column, justify="left" if not column else "right")
    for name, ratio in found.items():
        before = on_file.get(name)
        moved = before is not None and not 2 / 3 < ratio / before < 3 / 2
        known = "–" if before is None else f"{before:.2f}"
        table.add_row(name, known, f"{ratio:.2f}{'  moved' if moved else ''}")
    Console(width=100).print(table)
    if keep:
        about = {"machine": measure.machine(), "versions": measure.versions()}
        measure.write_whole(file, {"ratios": found, "repeats": repeats, **about})


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
