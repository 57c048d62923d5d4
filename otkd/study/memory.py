"""The memory that this process takes, as the operating system counts it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal


def reset_peak_memory() -> bool:
    """Make ``resident_memory("VmHWM")`` count from now on; returns whether that is possible.

    It is on Linux. Elsewhere the peak is that since the start of the process.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def resident_memory(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process in physical memory: now (``"VmRSS"``) or at most (``"VmHWM"``).

    Where the system does not tell the present value, both are the largest since the start.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    # Python has this module on Unix only.
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
