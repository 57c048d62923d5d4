"""What every result says about its training, versions and hardware, without naming the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from otkd.version import __version__

if TYPE_CHECKING:
    from otkd.study.experiment import Experiment
    from otkd.study.interface import Rows
    from otkd.study.training import Fit


def provenance(experiment: Experiment, rows: Rows, took: Fit) -> dict[str, Any]:
    """The fields of a result that do not depend on its outcome."""
    return {
        "task": experiment.task.name,
        "headline": experiment.task.headline,
        "rows": rows.counts(),
        "steps": took.steps,
        "seconds": took.seconds,
        "evaluations": [{"step": step, **metrics} for step, metrics in took.evaluations],
        "precision": experiment.precision.name,
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    import transformers

    return {
        "otkd": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, threads and device."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def processor() -> str:
    """The model of the processor."""
    # On most Linux systems platform.processor() is empty or only the architecture.
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
