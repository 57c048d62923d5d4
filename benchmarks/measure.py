"""Time, peak memory and error of a call, and where they were measured.

Run as a script it measures the peak memory of one call in a process of its own; see
:func:`peak_memory`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from otkd.study.machine import processor

Call = Callable[[], object]
# A shorter call is made so often in a row that they take as long together: once, it would be timed
# with cold caches and with what the clock itself takes.
_SHORTEST = 0.05


def alternate(calls: Mapping[str, Call], rounds: Mapping[str, int]) -> dict[str, list[float]]:
    """Seconds of every call in every round; the calls take turns.

    Before, each is called until it is warm, which is not counted; one of a single round, slow, is
    not.
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
    """How often in a row a call is made to take ``_SHORTEST``; 1 if it takes as long by itself."""
    times = 1
    if _seconds(call, times) > 20 * _SHORTEST:  # long, even if this was not warm
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
    """Seconds of one call in every round, after one that is not counted."""
    return alternate({"": call}, {"": rounds})[""]


def spread(seconds: list[float]) -> dict:
    """Median, least and greatest, and those of every round, so that ratios can be computed."""
    return {**_spread(seconds), "rounds": [float(f"{x:.4g}") for x in seconds]}


def _spread(numbers: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(numbers),
        "low": min(numbers),
        "high": max(numbers),
        "repeats": len(numbers),
    }


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ours over theirs, round by round: what slows the machine down slows both."""
    return _spread([a / b for a, b in zip(ours, theirs, strict=False)])


def relative_error(values: Tensor, reference: Tensor) -> float:
    """‖x − reference‖ / ‖reference‖ over all elements, where the reference is."""
    reference = reference.double()
    return ((values.to(reference) - reference).norm() / reference.norm()).item()


# Parameters of glibc's mallopt and what they are by default.
_MMAP_MAX, _TRIM_THRESHOLD = (-4, 65536), (-1, 128 * 1024)


@contextmanager
def keeping_memory() -> Iterator[bool]:
    """Have the allocator keep what is freed; gives whether it does."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is None:
        yield False
        return
    kept = bool(mallopt(_MMAP_MAX[0], 0) and mallopt(_TRIM_THRESHOLD[0], 2**31 - 1))
    try:
        yield kept
    finally:
        for parameter in (_MMAP_MAX, _TRIM_THRESHOLD):
            mallopt(*parameter)


def peak_memory(job: Mapping) -> dict:
    """Peak memory of one call, in a process of its own, beyond its inputs.

    The process makes the inputs, runs the call once on a tiny problem (which loads and warms up the
    libraries), gives what is free back to the system, resets the kernel's high-water mark of its
    resident memory (``/proc/self/clear_refs``), and then calls: the mark less the memory before.
    Blocks above 64 KiB come from the system and return to it, so that memory that is free but held
    is not counted. What a GPU holds is counted elsewhere, in the process itself.

    Args:
        job: ``{"runner": module, "arguments": …}``; ``module.prepare_job(arguments, tiny=…)``
            returns the call.

    Returns:
        ``{"bytes", "method"}``, or ``{"bytes": None, "method": why not}``.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(job)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"bytes": None, "method": f"not measured: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def _measure_peak(job: Mapping) -> dict:
    runner = importlib.import_module(job["runner"])
    torch.set_num_threads(job["threads"])
    call = runner.prepare_job(job["arguments"], tiny=False)
    runner.prepare_job(job["arguments"], tiny=True)()
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
    was_reset = _reset_high_water()
    before, mark = _resident("VmRSS"), _resident("VmHWM")
    call()
    peak = _resident("VmHWM")
    method = "VmHWM after reset" if was_reset else "VmHWM"
    if peak <= mark and not was_reset:
        return {"bytes": None, "method": "not measured: making the inputs took more"}
    return {"bytes": peak - before, "method": method}


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict:
    """Processor, cores, memory, threads and device; nothing that names the machine."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "system": platform.system(),
    }


# By the names of their distributions.
_COMPARED = (
    "pot",
    "geomloss",
    "pykeops",
    "triton",
    "liger_kernel",
    "trl",
    "torchdistill",
    "transformers",
    "otkd",
)


def versions() -> dict[str, str | None]:
    """Versions of everything that is compared; None of what is not there."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda
    for package in _COMPARED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of this repository, ``+`` where files differ from it; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write_whole(path: Path, result: Mapping) -> None:
    """Write JSON so that a reader finds all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    print(json.dumps(_measure_peak(json.loads(sys.argv[1]))))
