"""Whether bfloat16 pays on this machine, by measurement."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from otkd.study.results import write_json

PRECISION_FILE = "precision.json"
# bf16 rounds; it has to pay for that.
_REQUIRED_SPEEDUP = 1.1
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 3, 20, 5.0


@dataclass(frozen=True)
class Precision:
    """A choice and what it rests on; times in seconds for one forward and backward pass."""

    name: str
    reason: str
    fp32_seconds: float | None = None
    bf16_seconds: float | None = None

    @property
    def bf16(self) -> bool:
        """Whether to run under bfloat16 autocast."""
        return self.name == "bf16"


def supports_bf16() -> bool:
    """Whether training in bf16 is possible; on a CPU it always is, if slow."""
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    return not torch.accelerator.is_available() or is_torch_bf16_gpu_available()


def measure_precision(
    model: nn.Module, batch: Mapping[str, Tensor], device: torch.device
) -> Precision:
    """Time a forward and a backward pass of ``model`` on ``batch`` in both precisions."""
    if not supports_bf16():
        return Precision("fp32", "the accelerator here does not support bf16")
    model.to(device).train()
    batch = {name: value.to(device) for name, value in batch.items()}
    times = {"fp32": math.inf, "bf16": math.inf}
    # In turn and for a while, so that other work on the machine falls on both, and the fastest pass
    # of each is one that it left alone. The first round only warms up.
    start = time.perf_counter()
    rounds = 0
    while rounds <= _MIN_ROUNDS or (
        rounds <= _MAX_ROUNDS and time.perf_counter() - start < _SECONDS
    ):
        for name in times:
            seconds = _time_pass(model, batch, name == "bf16")
            if rounds:
                times[name] = min(times[name], seconds)
        rounds += 1
    model.zero_grad(set_to_none=True)
    ratio = times["fp32"] / times["bf16"]
    name = "bf16" if ratio >= _REQUIRED_SPEEDUP else "fp32"
    return Precision(
        name,
        f"a training pass is {ratio:.2f} times as fast in bf16 as in fp32 on this machine",
        times["fp32"],
        times["bf16"],
    )


def _time_pass(model: nn.Module, batch: Mapping[str, Tensor], bf16: bool) -> float:
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    start = time.perf_counter()
    with autocast:
        loss = model(**batch).loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def read_precision(path: Path) -> Precision | None:
    """The choice of an earlier command, so that all runs of a comparison share one."""
    try:
        return Precision(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_precision(path: Path, precision: Precision) -> None:
    """Keep a choice for later commands."""
    write_json(path, asdict(precision))
