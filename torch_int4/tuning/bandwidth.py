"""The rate at which this machine's threads read memory together."""

from __future__ import annotations

import mmap
import re
import time
from pathlib import Path

import torch
from torch import Tensor

from torch_int4 import ops  # noqa: F401  (registers the probes)

SIZE = 256 << 20  # bytes to read; more than any cache here
HUGE = 2 << 20
USUAL = ((1, 0), (4, 0))  # streams a thread, and bytes that are fetched ahead
_ROUNDS = 4
_STEP = 256 * 8  # bytes: the buffer must divide among threads and streams


class ReadBuffer:
    """Memory with 2 MiB or 4 KiB pages as far as Linux grants them; `granted` is the share in 2 MiB pages."""

    def __init__(self, size: int = SIZE, *, huge: bool = True) -> None:
        self._map = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE
        step = _STEP * torch.get_num_threads()
        self.data: Tensor = whole[start : start + size // step * step]
        self.data.fill_(1)
        self.granted = _huge_share(self.data)

    def speed(self, streams: int, prefetch: int) -> float:
        """Bytes per second of reading all of it once, on a processor with AVX2."""
        return self.data.numel() / float(torch.ops.torch_int4.probe_read(self.data, streams, prefetch))


def read_bandwidth(buffer: ReadBuffer | None = None) -> float:
    """Bytes per second that the threads of torch read together: the best of a few passes over 256 MiB.

    Where the processor has no AVX2, which the probe needs, torch adds the bytes up instead.
    """
    buffer = ReadBuffer() if buffer is None else buffer
    if torch.ops.torch_int4.probe_names():
        return max(buffer.speed(*variant) for _ in range(_ROUNDS) for variant in USUAL)
    values = buffer.data.view(torch.float32)
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return buffer.data.numel() / min(seconds)


def _huge_share(data: Tensor) -> float:
    """The share of `data` that lies in 2 MiB pages, as Linux counts them; NaN where it does not say."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return float("nan")
    inside = False
    middle = data.data_ptr() + data.numel() // 2
    for line in lines:
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return min(1.0, int(line.split()[1]) * 1024 / data.numel())
    return float("nan")
