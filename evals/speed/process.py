"""Memory of this process, as Linux counts it."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path


def resident_bytes() -> int:
    """Memory that is resident now: code, libraries and mapped pages included.

    Raises:
        OSError: the system has no /proc.
    """
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reset_peak() -> bool:
    """Starts the count of peak memory over; False where the system cannot (then what was before counts too)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_bytes() -> int:
    """Largest resident memory of this process since `reset_peak`, or since its start."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
