"""Peak memory of a call beyond its inputs, and allocators that keep freed memory.

Run as a script it measures one call in a process of its own; see :func:`peak`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from otkd.study.memory import reset_peak_memory, resident_memory

# Parameters of glibc's mallopt and their default values.
_MMAP_MAX, _TRIM_THRESHOLD = (-4, 65536), (-1, 128 * 1024)


@contextmanager
def keeping_memory() -> Iterator[bool]:
    """Make the allocator keep freed memory; yields whether it does."""
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


def peak(runner: str, arguments: Mapping, unit: int, name: str = "peak_units") -> dict:
    """Peak memory of one call in a process of its own, in bytes and in units of ``unit`` bytes.

    The process makes the inputs, runs the call once on a tiny problem (which loads and warms up the
    libraries), returns free memory to the system, resets the kernel's high-water mark of its
    resident memory (``/proc/self/clear_refs``), and then calls: the result is the mark less the
    memory before. Blocks above 64 KiB are returned to the system when they are freed, so that free
    memory that the allocator still holds is not counted.

    Args:
        runner: a module whose ``prepare_job(arguments, tiny=…)`` returns the call.
        arguments: for ``prepare_job``.
        unit: bytes.
        name: of the field that holds the peak in units.
    """
    job = {"runner": runner, "arguments": arguments, "threads": torch.get_num_threads()}
    found = _in_its_own_process(job)
    units = None if found["bytes"] is None else found["bytes"] / unit
    return {"peak_bytes": found["bytes"], name: units, "peak_method": found["method"]}


def peak_on_gpu(call: Callable[[], object], unit: int, name: str = "peak_units") -> dict:
    """The same on a GPU, in this process, as counted by torch."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    found = torch.cuda.max_memory_allocated() - before
    return {
        "peak_bytes": found,
        name: found / unit,
        "peak_method": "torch.cuda.max_memory_allocated",
    }


def _in_its_own_process(job: Mapping) -> dict:
    """``{"bytes", "method"}``, or ``{"bytes": None, "method": why not}``."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(job)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"bytes": None, "method": f"not measured: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def _measure(job: Mapping) -> dict:
    runner = importlib.import_module(job["runner"])
    torch.set_num_threads(job["threads"])
    call = runner.prepare_job(job["arguments"], tiny=False)
    runner.prepare_job(job["arguments"], tiny=True)()
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
    was_reset = reset_peak_memory()
    before, mark = resident_memory("VmRSS"), resident_memory("VmHWM")
    call()
    high = resident_memory("VmHWM")
    method = "VmHWM after reset" if was_reset else "VmHWM"
    if high <= mark and not was_reset:
        return {"bytes": None, "method": "not measured: making the inputs took more"}
    return {"bytes": high - before, "method": method}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
