"""Time and error of calls."""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Call = Callable[[], object]
# A shorter call is repeated until one measurement takes this long: a single call would be timed
# with cold caches, and the clock's own overhead would count.
_SHORTEST = 0.05


def alternate(calls: Mapping[str, Call], rounds: Mapping[str, int]) -> dict[str, list[float]]:
    """Seconds of every call in every round; the calls take turns.

    Calls are warmed up first, which is not counted, except those of a single round, which are slow.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    times = {name: _times_a_round(call) if rounds[name] > 1 else 1 for name, call in calls.items()}
    for index in range(max(rounds.values())):
        for name, call in calls.items():
            if index < rounds[name]:
                gc.collect()
                seconds[name].append(_seconds(call, times[name]) / times[name])
    return seconds


def _times_a_round(call: Call) -> int:
    """How many calls in a row take at least ``_SHORTEST``."""
    times = 1
    if _seconds(call, times) > 20 * _SHORTEST:  # long enough, even for a first call
        return times
    while (seconds := _seconds(call, times)) < _SHORTEST:
        times = max(2 * times, math.ceil(times * _SHORTEST / seconds))
    return times


def _seconds(call: Call, times: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    _synchronize()
    return time.perf_counter() - start


def repeat(call: Call, rounds: int) -> list[float]:
    """Seconds of one call in every round, after a warm-up."""
    return alternate({"": call}, {"": rounds})[""]


def spread(seconds: list[float]) -> dict:
    """Median, least and greatest, and the time of every round, so that ratios can be computed."""
    return {**_spread(seconds), "rounds": [float(f"{x:.4g}") for x in seconds]}


def _spread(numbers: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(numbers),
        "low": min(numbers),
        "high": max(numbers),
        "repeats": len(numbers),
    }


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """The peer's time over ours, round by round: what slows the machine down slows both."""
    return _spread([a / b for a, b in zip(theirs, ours, strict=False)])


def against(seconds: Mapping[str, list[float]], ours: str) -> dict:
    """The parts of a case that follow from its times: its peers' seconds, and ratios to ours."""
    return {
        "peers": {name: {"seconds": spread(times)} for name, times in seconds.items()},
        "times": {name: ratio(seconds[name], seconds[ours]) for name in seconds if name != ours},
    }


@contextmanager
def without_warnings() -> Iterator[None]:
    """For settings that are not meant to converge, or that float32 cannot reach."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def relative_error(values: Tensor, reference: Tensor) -> float:
    """‖x − reference‖ / ‖reference‖ over all elements, on the reference's device."""
    reference = reference.double()
    return ((values.to(reference) - reference).norm() / reference.norm()).item()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
