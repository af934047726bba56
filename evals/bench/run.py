"""Measures points: every contestant in turn, again and again, so that a disturbance hits all of them alike."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_int4
from torch_int4 import Int4Error, Int4Weight, ops
from torch_int4.evals.bench import peers
from torch_int4.evals.bench.contestants import Contestant, Ours, ours
from torch_int4.evals.bench.points import Point, WeightPoint, by_weight
from torch_int4.evals.bench.roofline import ISSUE, Limit, Roofline

ROTATE = 256 << 20  # bytes that the copies of a weight take at least
MIN_ROUNDS = 3
PAUSE = 0.003  # seconds in which the waiting threads of the previous contestant's pool go to sleep
_CHECKED_ROWS = 4

Note = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One contestant at one point; seconds are of one product, the mean over a pass through all copies.

    `kernels` is the kernel set that ran, or the version of a peer. The last five fields are None where there is no
    peer, or no roof: roofs hold for this package's kernel sets.
    """

    point: Point
    contestant: str
    ours: bool
    kernels: str
    nbytes: int
    copies: int
    rounds: int
    min_s: float
    median_s: float
    error: float  # norm of the error over the norm of the product with the dequantized weight
    read_s: float  # bytes that the read loop got in a second, at best between the rounds of this point
    issue_s: float  # instructions that the threads issued in a second between them, in the median
    best_peer: str | None = None
    speedup: float | None = None  # the best peer's minimum over this one
    roof: str | None = None
    of_roof: float | None = None
    of_issue: float | None = None  # issue_s over the best of the run

    @property
    def gb_s(self) -> float:
        """Weight bytes read in a nanosecond, scales and zero points included."""
        return self.nbytes / self.min_s / 1e9

    @property
    def gop_s(self) -> float:
        """Multiplications and additions in a nanosecond."""
        return self.point.operations / self.min_s / 1e9

    @property
    def of_read(self) -> float | None:
        """The share of `read_s` that was reached; None where arithmetic takes longer than reading."""
        return self.nbytes / self.min_s / self.read_s if self.point.rows <= 4 else None


@dataclass(frozen=True)
class Result:
    """A whole run."""

    machine: dict[str, Any]
    roofline: Roofline
    rows: list[Row]


def rotation() -> int:
    """Bytes that copies take: ROTATE, or four times a last-level cache that is larger than a quarter of it."""
    try:
        return max(ROTATE, 4 * os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (ValueError, OSError):
        return ROTATE


def random_weight(point: WeightPoint, seed: int = 0) -> Int4Weight:
    """A weight with the given shape and uniform codes; its values matter to no kernel's speed."""
    g = torch.Generator().manual_seed(seed)
    groups = 1 if point.group == -1 else -(-point.K // point.group)
    codes = torch.randint(0, 16, (point.N, point.K), dtype=torch.uint8, generator=g)
    scales = ((torch.rand(point.N, groups, generator=g) + 0.5) * 0.01).half()
    zeros = None
    if point.offset == "integer":
        zeros = torch.randint(6, 11, (point.N, groups), dtype=torch.uint8, generator=g)
    return Int4Weight(codes, scales, zeros, None, None, point.group)


@torch.inference_mode()
def run(
    points: Sequence[Point],
    *,
    isas: Sequence[str] = (),
    with_peers: bool = True,
    seconds: float = 4.0,
    rotate: int | None = None,
    roofline: Roofline | None = None,
    note: Note = lambda text: None,
) -> Result:
    """Measures `points` for the kernel sets `isas` (the one in use if none is given) and every peer there is.

    A point takes about `seconds`, or longer where three rounds need it. The memory is that of `rotate` bytes for each
    contestant, about 3 GB with all peers.

    Raises:
        Int4Error: for a kernel set that cannot run here, or a contestant whose results are wrong.
    """
    rotate = rotation() if rotate is None else rotate
    before, found = ops.isa(), machine(rotate)
    try:
        for name in isas:
            ops.set_isa(name)
        note("measuring what the machine can do")
        roofline = roofline or Roofline().start()
        rows = []
        for weight_point, chosen in by_weight(points).items():
            note(f"{weight_point.label}: building copies")
            weight = random_weight(weight_point)
            layers = ours(weight, rotate)
            others = [build() for build in peers.builders(weight, rotate).values()] if with_peers else []
            dense = weight.dequantize()
            for point in chosen:
                note(f"{weight_point.label}, {point.rows} rows, {point.compute}")
                mine = [Ours(layers, isa, point.compute) for isa in isas or (before,)]
                rows += _measure(point, [*mine, *others], dense, roofline, seconds)
            del layers, others, dense
    finally:
        ops.set_isa(before)
    return Result(found, roofline, compare(rows, roofline))


def compare(rows: Iterable[Row], roofline: Roofline) -> list[Row]:
    """Fills in how rows stand to the best peer of their point and to their roof, as far as those exist."""
    rows = list(rows)
    best: dict[Point, Row] = {}
    for row in rows:
        if not row.ours and (row.point not in best or row.min_s < best[row.point].min_s):
            best[row.point] = row
    compared = []
    for row in rows:
        peer, roof = best.get(row.point), roof_of(row, roofline) if row.ours else None
        if peer and row.ours:
            row = replace(row, best_peer=peer.contestant, speedup=peer.min_s / row.min_s)
        if roof:
            work = row.nbytes if roof == roofline.bandwidth() else row.point.operations
            row = replace(row, roof=roof.name, of_roof=roof.share(work, row.min_s))
        if row.ours and ISSUE in roofline.peaks:
            row = replace(row, of_issue=row.issue_s / roofline.peaks[ISSUE])
        compared.append(row)
    return compared


def roof_of(row: Row, roofline: Roofline) -> Limit | None:
    """Bandwidth for integer products of up to 4 rows, the kernel set's peak from 16 rows, else the tighter one."""
    point, memory = row.point, roofline.bandwidth()
    peak = roofline.peak(row.kernels, point.compute)
    if point.rows >= 16:
        return peak
    if peak is None or (point.rows <= 4 and point.compute in ("int8", "int8x2")):
        return memory
    slower_to_read = row.nbytes / memory.per_second > point.operations / peak.per_second
    return memory if slower_to_read else peak


def _measure(
    point: Point, contestants: list[Contestant], dense: Tensor, roofline: Roofline, seconds: float
) -> list[Row]:
    x = torch.randn(point.rows, point.weight.K, generator=torch.Generator().manual_seed(1))
    errors = [_error(contestant, x, dense) for contestant in contestants]
    times: list[list[float]] = [[] for _ in contestants]
    kernels = [""] * len(contestants)
    reads: list[float] = []
    issued: list[float] = []
    order = list(range(len(contestants)))
    shuffle = random.Random(0)  # not always the same neighbour before one's turn
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        rounds += 1
        shuffle.shuffle(order)
        for i in order:
            contestants[i].bind(x)
            times[i].append(_pass(contestants[i]))
            kernels[i] = contestants[i].kernels()
        time.sleep(PAUSE)
        reads.append(roofline.read_now())
        issued.append(roofline.issue_now())
        for isa in {contestant.isa for contestant in contestants if isinstance(contestant, Ours)}:
            roofline.refresh(isa)
    return [
        Row(
            point=point,
            contestant=contestant.name,
            ours=isinstance(contestant, Ours),
            kernels=kernel,
            nbytes=contestant.nbytes,
            copies=contestant.copies,
            rounds=rounds,
            min_s=min(taken),
            median_s=statistics.median(taken),
            error=error,
            read_s=max(reads),
            issue_s=statistics.median(issued),
        )
        for contestant, kernel, taken, error in zip(contestants, kernels, times, errors, strict=True)
    ]


def _pass(contestant: Contestant) -> float:
    """Seconds of one product, the mean over all copies."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    contestant.run()
    return (time.perf_counter() - start) / contestant.copies


def _error(contestant: Contestant, x: Tensor, dense: Tensor) -> float:
    """The error of a few rows; also the warm-up, in which memory is allocated and threads start."""
    contestant.bind(x)
    y = contestant.run()[:_CHECKED_ROWS].float()
    expected = x[:_CHECKED_ROWS] @ dense.T
    error = float((y - expected).norm() / expected.norm())
    if not error <= contestant.tolerance:
        raise Int4Error(
            f"{contestant.name}: its result is off by {error:.3g} of the norm, more than {contestant.tolerance}: "
            "a comparison with it would mean nothing; leave it out with --no-peers, or report this"
        )
    return error


def machine(rotate: int) -> dict[str, Any]:
    """Where and with what figures are taken, as data; the load is that of now, before the run."""
    found = torch_int4.info()
    try:
        cpu = Path("/proc/cpuinfo").read_text()
        model = next(line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        model = "unknown"
    return found | {"cpu": model, "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "rotate_bytes": rotate}
