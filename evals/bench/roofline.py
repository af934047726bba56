"""The machine's limits, with the threads that torch uses: read bandwidth and peaks of arithmetic.

The model is that of Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009).
Each limit is the best of many samples, taken at the start of a run and again between the measurements: noise of
a shared machine can only make a sample smaller than the limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torch_int4 import ops
from torch_int4.errors import Int4Error
from torch_int4.tuning.bandwidth import SIZE, USUAL, ReadBuffer

PAGES = ("2 MiB", "4 KiB")
VARIANTS = tuple((streams, prefetch) for streams in (1, 2, 4, 8) for prefetch in (0, 1024, 4096))  # bytes ahead
ISSUE = "issue"  # the probe whose operations are instructions
_PROBE_SECONDS = 0.001  # short, so that some samples are undisturbed on a busy machine


@dataclass(frozen=True)
class Limit:
    """A roof by name, and how many bytes or operations it allows in a second."""

    name: str
    per_second: float

    def share(self, work: float, seconds: float) -> float:
        """How much of it was used by `work` in `seconds`."""
        return work / seconds / self.per_second


@dataclass
class Roofline:
    """Samples of the limits. `start` takes the first ones; `refresh` adds some of what a point is held against."""

    size: int = SIZE  # bytes to read
    read: dict[str, tuple[float, int, int]] = field(default_factory=dict)  # pages: bytes/s, streams, prefetch
    peaks: dict[str, float] = field(default_factory=dict)  # operations/s, and instructions/s of ISSUE
    huge_granted: float = float("nan")
    _buffer: ReadBuffer | None = None

    def start(self, repeats: int = 8) -> Roofline:
        """Measures every limit `repeats` times, and the peaks, whose samples are shorter, more often.

        Raises:
            Int4Error: on a processor whose kernel sets have no probes, as one without AVX2.
        """
        if not probe_names():
            raise Int4Error(
                "the bench measures vector kernels against probes, and none of the kernel sets that run here "
                f"({', '.join(ops.isas())}) has any: on x86-64 they need AVX2 and FMA"
            )
        buffers = {pages: ReadBuffer(self.size, huge=pages == PAGES[0]) for pages in PAGES}
        for _ in range(repeats):
            for pages, buffer in buffers.items():
                for streams, prefetch in VARIANTS:
                    self._note_read(pages, buffer, streams, prefetch)
        self._buffer = buffers[PAGES[0]]
        self.huge_granted = self._buffer.granted
        for _ in range(4 * repeats):
            for name in probe_names():
                self._note_peak(name)
        return self

    def refresh(self, isa: str) -> None:
        """One more sample of the peaks of a kernel set."""
        roofs = {roof_name(isa, compute) for compute in ("int8", "bf16", "fp32")}
        for name in sorted(roofs & set(self.peaks)):
            self._note_peak(name)

    def read_now(self) -> float:
        """Bytes that are read in a second at this moment: the best of a few ways, each tried once.

        The bandwidth of a virtual machine changes by a factor of two within minutes, and with it what any product can
        reach.
        """
        pages = PAGES[0]
        if self._buffer is None:
            return self.read[pages][0]
        variants = {self.read[pages][1:], *USUAL}
        return max(self._note_read(pages, self._buffer, *variant) for variant in sorted(variants))

    def issue_now(self) -> float:
        """Instructions that the threads issue in a second at this moment: half as many on cores that others share."""
        return self._note_peak(ISSUE)

    def bandwidth(self) -> Limit:
        """Bytes that can be read in a second: the better of both page sizes."""
        pages = max(self.read, key=lambda name: self.read[name][0])
        return Limit(f"read, {pages} pages", self.read[pages][0])

    def peak(self, isa: str, compute: str) -> Limit | None:
        """Operations in a second; None for a kernel set whose instructions no probe measures here."""
        name = roof_name(isa, compute)
        if name not in self.peaks:
            return None
        terms = 2 if compute == "int8x2" else 1  # two int8 products for one
        return Limit(name + (" / 2" if terms == 2 else ""), self.peaks[name] / terms)

    def _note_read(self, pages: str, buffer: ReadBuffer, streams: int, prefetch: int) -> float:
        speed = buffer.speed(streams, prefetch)
        if speed > self.read.get(pages, (0.0,))[0]:
            self.read[pages] = speed, streams, prefetch
        return speed

    def _note_peak(self, name: str) -> float:
        seconds, operations = torch.ops.torch_int4.probe_compute(name, 1000)
        iterations = max(1000, int(1000 * _PROBE_SECONDS / seconds))
        seconds, operations = torch.ops.torch_int4.probe_compute(name, iterations)
        self.peaks[name] = max(self.peaks.get(name, 0.0), operations / seconds)
        return operations / seconds


def probe_names() -> list[str]:
    """Names of the arithmetic probes that this processor runs, of all its kernel sets."""
    return [name for name in torch.ops.torch_int4.probe_names().split(",") if name]


def roof_name(isa: str, compute: str) -> str:
    """Name of the probe that bounds products of 4-bit weights by a kernel set, whether or not it runs here.

    Args:
        isa: a kernel set by name.
        compute: as in `Int4Config`; a product in int8x2 is two in int8.

    Returns:
        "" for a set that was not built or that has no probes.
    """
    return str(torch.ops.torch_int4.probe_roof(isa, "int8" if compute == "int8x2" else compute))
