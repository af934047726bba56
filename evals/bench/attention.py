"""Attention and the cache: time of a step or a prompt, next to torch's own attention on the same numbers.

A decode step reads the whole cache once, so its roof is the bandwidth that `roofline` reads at that time; a prompt is
arithmetic. Copies of the cache rotate, so that none is found in a processor's cache, and contestants take turns.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torch_int4 import Int4Error, ops
from torch_int4.evals.bench.attention_points import Point
from torch_int4.evals.bench.roofline import Roofline
from torch_int4.evals.bench.run import MIN_ROUNDS, PAUSE, Note, machine, rotation

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "int8": 3e-2}


@dataclass(frozen=True)
class Row:
    """One contestant at one point; seconds are of one call, the mean over a pass through all copies.

    `nbytes` is what a call reads of the cache (append: writes), with its scales. `speedup` is over the best of torch:
    of any type for a step, of the same type (if it has it) for a prompt.
    """

    point: Point
    contestant: str
    ours: bool
    cache: str
    nbytes: int
    copies: int
    rounds: int
    min_s: float
    median_s: float
    error: float  # norm of the error over the norm of the float32 result of torch
    read_s: float  # bytes that the read loop got in a second, at best between the rounds of this point
    speedup: float | None = None

    @property
    def gb_s(self) -> float:
        """Bytes of the cache read in a nanosecond."""
        return self.nbytes / self.min_s / 1e9

    @property
    def of_read(self) -> float | None:
        """The share of `read_s` that a decode step reached."""
        return self.nbytes / self.min_s / self.read_s if self.point.kind == "decode" else None

    @property
    def gop_s(self) -> float:
        """Multiplications and additions of the pairs that a causal mask leaves, in a nanosecond."""
        p = self.point
        pairs = p.tokens * (2 * p.context - p.tokens + 1) / 2
        return 4 * pairs * p.heads * p.dim / self.min_s / 1e9


@dataclass(frozen=True)
class Result:
    """A whole run."""

    machine: dict[str, Any]
    roofline: Roofline
    rows: list[Row]


@dataclass
class _Contestant:
    name: str
    ours: bool
    cache: str
    nbytes: int
    calls: Sequence[Callable[[], Tensor]]  # one per copy

    def time(self) -> float:
        time.sleep(PAUSE)
        start = time.perf_counter()
        for call in self.calls:
            call()
        return (time.perf_counter() - start) / len(self.calls)


@torch.inference_mode()
def run(
    points: Sequence[Point],
    *,
    isa: str = "",
    seconds: float = 4.0,
    rotate: int | None = None,
    roofline: Roofline | None = None,
    note: Note = lambda text: None,
) -> Result:
    """Measures `points` for one kernel set ("": the one in use), about `seconds` each; three rounds happen anyway.

    Every contestant rotates through `rotate` bytes of cache, or one copy where that is larger.

    Raises:
        Int4Error: for a kernel set that cannot run here, or a contestant whose result is wrong.
    """
    rotate = rotation() if rotate is None else rotate
    before, found = ops.isa(), machine(rotate)
    try:
        ops.set_isa(isa or before)
        found["isa"] = ops.isa()
        note("measuring what the machine can do")
        roofline = roofline or Roofline().start()
        rows = []
        for point in points:
            note(point.label)
            rows += _measure(point, roofline, seconds, rotate)
    finally:
        ops.set_isa(before)
    return Result(found, roofline, compare(rows))


def compare(rows: Iterable[Row]) -> list[Row]:
    """Fills in how rows stand to torch, as far as it runs there."""
    rows = list(rows)
    compared = []
    for row in rows:
        peers = [other for other in rows if other.point == row.point and not other.ours]
        if row.point.kind == "prefill":
            peers = [other for other in peers if other.cache == row.cache] or peers
        if row.ours and peers:
            row = replace(row, speedup=min(other.min_s for other in peers) / row.min_s)
        compared.append(row)
    return compared


def _measure(point: Point, roofline: Roofline, seconds: float, rotate: int) -> list[Row]:
    if point.kind == "append":
        contestants, errors = [_append(point, name, rotate) for name in CACHES], [0.0] * len(CACHES)
    else:
        contestants, errors = _attention_contestants(point, rotate)
    times: list[list[float]] = [[] for _ in contestants]
    reads: list[float] = []
    order = list(range(len(contestants)))
    shuffle = random.Random(0)
    end = time.perf_counter() + seconds
    while len(times[0]) < MIN_ROUNDS or time.perf_counter() < end:
        shuffle.shuffle(order)
        for i in order:
            times[i].append(contestants[i].time())
        time.sleep(PAUSE)
        reads.append(roofline.read_now())
    return [
        Row(
            point=point,
            contestant=c.name,
            ours=c.ours,
            cache=c.cache,
            nbytes=c.nbytes,
            copies=len(c.calls),
            rounds=len(taken),
            min_s=min(taken),
            median_s=statistics.median(taken),
            error=error,
            read_s=max(reads),
        )
        for c, taken, error in zip(contestants, times, errors, strict=True)
    ]


def _attention_contestants(point: Point, rotate: int) -> tuple[list[_Contestant], list[float]]:
    g = torch.Generator().manual_seed(0)
    shape = (1, point.kv_heads, point.context, point.dim)
    query = torch.randn(1, point.tokens, point.heads, point.dim, generator=g)
    key, value = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    expected = _torch_attention(point)(query, key, value)
    contestants, errors = [], []
    for name in CACHES:
        contestants.append(_ours(point, name, query, key, value, rotate))
        if name != "int8":
            contestants.append(_torch(point, name, query, key, value, rotate))
    for contestant in contestants:
        error = float((contestant.calls[-1]().float() - expected).norm() / expected.norm())
        if not error <= _TOLERANCE[contestant.cache]:
            raise Int4Error(
                f"{point.label}: the result of {contestant.name} with a {contestant.cache} cache is off by {error:.3g}"
            )
        errors.append(error)
    return contestants, errors


def _copies(tensors: Sequence[Tensor], rotate: int) -> list[list[Tensor]]:
    """As many clones of `tensors` as fill `rotate` bytes."""
    count = max(1, -(-rotate // sum(t.nbytes for t in tensors)))
    return [[t.clone() for t in tensors] for _ in range(count)]


def _ours(point: Point, name: str, query: Tensor, key: Tensor, value: Tensor, rotate: int) -> _Contestant:
    query = query.bfloat16() if name == "bf16" else query
    tensors = [key.to(CACHES[name]), value.to(CACHES[name])]
    if name == "int8":
        scales = [x.abs().amax(-1) / 127 for x in (key, value)]
        codes = [(x / s[..., None]).round().to(torch.int8) for x, s in zip((key, value), scales, strict=True)]
        tensors = codes + scales
    copies = _copies(tensors, rotate)

    def attend(copy: list[Tensor]) -> Tensor:
        key_scales, value_scales = copy[2:] or (None, None)
        return torch.ops.torch_int4.attention(
            query, *copy[:2], key_scales, value_scales, None, None, None, scale=point.dim**-0.5, causal=True
        )

    calls = [partial(attend, copy) for copy in copies]
    return _Contestant("ours", True, name, sum(t.nbytes for t in tensors), calls)


def _torch(point: Point, name: str, query: Tensor, key: Tensor, value: Tensor, rotate: int) -> _Contestant:
    query, key, value = (t.to(CACHES[name]) for t in (query, key, value))
    attend = _torch_attention(point)
    copies = _copies([key, value], rotate)
    calls = [partial(attend, query, *copy) for copy in copies]
    return _Contestant("torch", False, name, key.nbytes + value.nbytes, calls)


def _torch_attention(point: Point) -> Attend:
    """torch's attention with the layout of ours."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        y = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key,
            value,
            is_causal=point.kind == "prefill",
            enable_gqa=point.heads != point.kv_heads,
        )
        return y.transpose(1, 2)

    return attend


def _append(point: Point, name: str, rotate: int) -> _Contestant:
    """A step of rotary_append with `context` tokens before it; copies stand for layers."""
    capacity = point.context + 1
    cache = torch.zeros(1, point.kv_heads, capacity, point.dim).to(CACHES[name])
    tensors = [cache, cache.clone()]
    if name == "int8":
        tensors += [torch.zeros(1, point.kv_heads, capacity) for _ in range(2)]
    copies = _copies(tensors, min(rotate, 64 * sum(t.nbytes for t in tensors)))
    states = [torch.randn(1, 1, heads, point.dim) for heads in (point.heads, point.kv_heads, point.kv_heads)]
    cos, sin = torch.rand(1, 1, point.dim), torch.rand(1, 1, point.dim)
    lengths = [torch.tensor([point.context]) for _ in copies]

    def append(copy: list[Tensor], length: Tensor) -> Tensor:
        length.fill_(point.context)  # part of the time, a microsecond or so
        key_scales, value_scales = copy[2:] or (None, None)
        return torch.ops.torch_int4.rotary_append(
            *states, cos, sin, *copy[:2], key_scales, value_scales, length, rotary_dim=point.dim
        )

    calls = [partial(append, copy, length) for copy, length in zip(copies, lengths, strict=True)]
    written = sum(t.nbytes for t in tensors) // capacity
    return _Contestant("ours", True, name, written, calls)
