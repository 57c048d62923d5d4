"""Prediction over encoded rows, and whether bfloat16 is faster on this machine."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from otkd.integrations.models import describe
from otkd.integrations.outputs import read_outputs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 64
PRECISION_FILE = "precision.json"
# bf16 rounds, so it must be clearly faster to be chosen.
_REQUIRED_SPEEDUP = 1.1
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 3, 20, 5.0


class Predictor:
    """Rows in padded batches of similar length, for the predictions of many models.

    Args:
        rows: encoded rows (see :func:`otkd.tasks.encode`).
        tokenizer: pads the batches.
        bf16: predict under bfloat16 autocast.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, bf16: bool):
        self.bf16 = bf16
        order = torch.argsort(torch.tensor(rows["length"][:]), descending=True, stable=True)
        self._back = torch.argsort(order)
        self.labels = torch.tensor(rows["labels"][:])
        inputs = [name for name in rows.column_names if name not in ("length", "labels")]
        rows = rows.select_columns(inputs)
        self._batches = [
            dict(tokenizer.pad(rows[part.tolist()], return_tensors="pt"))
            for part in order.split(_ROWS)
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Float32 logits ``(rows, num_labels)``; ``FloatingPointError`` if one is not finite."""
        return self._predict(model, "logits")

    def features(self, model: PreTrainedModel) -> Tensor:
        """Float32 states ``(rows, width)``, as read by losses that compare states; likewise."""
        return self._predict(model, "features")

    @torch.no_grad()
    def _predict(self, model: PreTrainedModel, name: str) -> Tensor:
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        description, features = describe(model), name == "features"
        options = {"output_hidden_states": True} if features else {}
        parts = []
        with autocast(device, self.bf16):
            for batch in self._batches:
                inputs = {k: x.to(device) for k, x in batch.items() if k in description.arguments}
                outputs = model(**inputs, **options)
                outputs = read_outputs(outputs, description, "student", features=features)
                parts.append(outputs[name].float())
        model.train(was_training)
        values = torch.cat(parts).cpu()[self._back]
        # argmax of a row with NaN gives a class, so that no score would show it.
        bad = int((~values.isfinite()).any(-1).sum())
        if bad:
            what = "states" if features else name
            raise FloatingPointError(
                f"the model's {what} on {bad} of {len(values)} rows are not finite"
            )
        return values


def autocast(device: torch.device, bf16: bool) -> Any:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


@dataclass(frozen=True)
class Precision:
    """``"fp32"`` or ``"bf16"``, the reason, and the seconds of a forward and backward pass."""

    name: str
    reason: str
    fp32_seconds: float | None = None
    bf16_seconds: float | None = None

    @property
    def bf16(self) -> bool:
        """Whether to train and predict under bfloat16 autocast."""
        return self.name == "bf16"


def supports_bf16() -> bool:
    """Whether training in bf16 is possible; on a CPU it always is, if slow."""
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    return not torch.accelerator.is_available() or is_torch_bf16_gpu_available()


def emulates_bf16() -> bool:
    """Whether training runs on an x86 processor without instructions for bf16.

    It is then several times as slow in bf16 as in fp32. Versions of torch that do not know the
    processor count as not emulating.
    """
    known = getattr(torch.cpu, "get_capabilities", None)
    if torch.accelerator.is_available() or known is None:
        return False
    found = known()
    has = any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return found.get("architecture") == "x86_64" and not has


def measure_precision(
    model: nn.Module, batch: Mapping[str, Tensor], device: torch.device
) -> Precision:
    """Time a forward and a backward pass of ``model`` on ``batch`` in both precisions."""
    if not supports_bf16():
        return Precision("fp32", "the accelerator does not support bf16")
    model.to(device).train()
    batch = {name: value.to(device) for name, value in batch.items()}
    times = {"fp32": math.inf, "bf16": math.inf}
    # Alternating, so that other work on the machine affects both; the fastest pass of each is the
    # least disturbed. The first round only warms up.
    start, rounds = time.perf_counter(), 0
    while rounds <= _MIN_ROUNDS or (
        rounds <= _MAX_ROUNDS and time.perf_counter() - start < _SECONDS
    ):
        for name in times:
            begun = time.perf_counter()
            with autocast(device, name == "bf16"):
                loss = model(**batch).loss
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if rounds:
                times[name] = min(times[name], time.perf_counter() - begun)
        rounds += 1
    model.zero_grad(set_to_none=True)
    ratio = times["fp32"] / times["bf16"]
    return Precision(
        "bf16" if ratio >= _REQUIRED_SPEEDUP else "fp32",
        f"a training pass is {ratio:.2f} times as fast in bf16 as in fp32 on this machine",
        times["fp32"],
        times["bf16"],
    )


def read_precision(path: Path) -> Precision | None:
    """The choice of an earlier command, so that all runs of a comparison share one."""
    try:
        return Precision(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
