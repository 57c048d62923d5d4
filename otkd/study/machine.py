"""Where a result was made: versions and hardware, without names that identify the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    import torch
    import transformers

    from otkd.version import __version__

    return {
        "otkd": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, threads and device."""
    import torch

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def processor() -> str:
    """Its model, as the system tells it."""
    # platform.processor() is empty or only the architecture on most Linux systems.
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
