"""Numbers that every process collects, and that are combined over all processes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

Number = Tensor | float


class Tally:
    """Named sums and extremes, kept on their device until :meth:`take`.

    Processes may use different names in any order: :meth:`take` exchanges the names with the
    numbers. A process without a name adds nothing to its sum and does not affect its extreme.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Number] = {}

    def add(self, name: str, value: Number) -> None:
        """Add to the sum ``name``."""
        self._update("sum", name, value)

    def add_mean(self, name: str, total: Number, weight: Number) -> None:
        """Add to the sum and to the weight whose quotient is the mean ``name``."""
        self._update("total", name, total)
        self._update("weight", name, weight)

    def most(self, name: str, value: Number) -> None:
        """Keep the largest ``value`` as ``name``."""
        self._update("most", name, value)

    def least(self, name: str, value: Number) -> None:
        """Keep the smallest ``value`` as ``name``."""
        self._update("least", name, value)

    def _update(self, kind: str, name: str, value: Number) -> None:
        if isinstance(value, Tensor):
            value = value.detach()
            value = value.to(torch.float32 if value.device.type == "mps" else torch.float64)
        key = kind, name
        self._kept[key] = _COMBINED[kind](self._kept[key], value) if key in self._kept else value

    def take(self) -> dict[str, float]:
        """All numbers of all processes since the last call; every process must call this.

        Only here is the device read, once, and do processes wait for each other. Means come after
        the sums and extremes; a mean without weight is left out.
        """
        own, self._kept = _as_floats(self._kept), {}
        kept: dict[tuple[str, str], float] = {}
        for part in gather_object([own]):
            for key, value in part.items():
                kept[key] = _COMBINED[key[0]](kept[key], value) if key in kept else value
        found = {name: v for (kind, name), v in kept.items() if kind not in ("total", "weight")}
        for (kind, name), total in kept.items():
            if kind == "total" and (weight := kept["weight", name]):
                found[name] = total / weight
        return found


def _extreme(
    of_tensors: Callable[[Tensor, Tensor], Tensor], of_floats: Callable[..., float]
) -> Callable[[Number, Number], Number]:
    def combine(a: Number, b: Number) -> Number:
        if isinstance(a, Tensor):
            return of_tensors(a, torch.as_tensor(b, dtype=a.dtype, device=a.device))
        if isinstance(b, Tensor):
            return combine(b, a)
        # torch's functions, because Python's min and max may drop a NaN.
        return math.nan if math.isnan(a) or math.isnan(b) else of_floats(a, b)

    return combine


_COMBINED: dict[str, Callable[[Any, Any], Any]] = {
    "sum": operator.add,
    "total": operator.add,
    "weight": operator.add,
    "most": _extreme(torch.maximum, max),
    "least": _extreme(torch.minimum, min),
}


def _as_floats(kept: dict[tuple[str, str], Number]) -> dict[tuple[str, str], float]:
    tensors = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
    found = {key: float(value) for key, value in kept.items() if key not in tensors}
    if tensors:
        values = torch.stack([value.reshape(()) for value in tensors.values()]).tolist()
        found |= dict(zip(tensors, values, strict=True))
    return found
