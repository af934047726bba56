"""Operating points as data: what is measured, and the filters that choose from it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch_int4.errors import Int4Error

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
# Llama-2-7B (attention, up, down, head), TinyLlama (attention, up), SmolLM2-135M (up); outputs x inputs.
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096), (2048, 2048), (5632, 2048), (576, 1536))
GROUPS = (32, 64, 128, 256, 1024, -1)
COMPUTE = ("int8", "int8x2", "bf16", "fp32")
OFFSETS = ("symmetric", "integer")

QUICK_ROWS = (1, 4, 16, 128, 512)
QUICK_SHAPES = ((4096, 4096), (11008, 4096))
QUICK_GROUPS = (128, 32)


@dataclass(frozen=True, order=True)
class WeightPoint:
    """A quantized weight `[N, K]`; `offset` is symmetric, or integer for zero points."""

    N: int
    K: int
    group: int
    offset: str

    @property
    def label(self) -> str:
        """For people: ``4096x4096 g128``, with ``asym`` for zero points, ``row`` for one group a row."""
        group = "row" if self.group == -1 else f"g{self.group}"
        return f"{self.N}x{self.K} {group}" + ("" if self.offset == "symmetric" else " asym")


@dataclass(frozen=True, order=True)
class Point:
    """`rows` inputs times a weight, in one of the arithmetics of the operator."""

    weight: WeightPoint
    rows: int
    compute: str = "int8"

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.weight.N * self.weight.K


def select(
    *,
    full: bool = False,
    rows: Sequence[int] = (),
    shapes: Sequence[tuple[int, int]] = (),
    groups: Sequence[int] = (),
    compute: Sequence[str] = (),
    offsets: Sequence[str] = (),
) -> list[Point]:
    """Points of the quick set or of all of them, ordered by weight. A filter replaces the set's own values.

    Raises:
        Int4Error: for a value that no kernel takes.
    """
    _check(rows, shapes, groups, compute, offsets)
    weights = itertools.product(
        shapes or (SHAPES if full else QUICK_SHAPES),
        groups or (GROUPS if full else QUICK_GROUPS),
        offsets or (OFFSETS if full else OFFSETS[:1]),
    )
    chosen_rows = rows or (ROWS if full else QUICK_ROWS)
    chosen_compute = compute or (COMPUTE if full else COMPUTE[:1])
    points = []
    for (N, K), group, offset in weights:
        weight = WeightPoint(N, K, group, offset)
        points += [Point(weight, m, how) for how in chosen_compute for m in chosen_rows]
    if not full and not (rows or shapes or groups or compute):
        points.append(Point(WeightPoint(4096, 4096, 128, "symmetric"), 512, "fp32"))
    return list(dict.fromkeys(points))


def parse_shape(text: str) -> tuple[int, int]:
    """``11008x4096`` as (outputs, inputs)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise Int4Error(f"shape {text!r}: give outputs x inputs, as in 11008x4096")
    return int(parts[0]), int(parts[1])


def by_weight(points: Iterable[Point]) -> dict[WeightPoint, list[Point]]:
    """Points that share a weight, which is built once for them."""
    found: dict[WeightPoint, list[Point]] = {}
    for point in points:
        found.setdefault(point.weight, []).append(point)
    return found


def _check(
    rows: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    groups: Sequence[int],
    compute: Sequence[str],
    offsets: Sequence[str],
) -> None:
    if any(m < 1 for m in rows):
        raise Int4Error(f"rows must be 1 or more, not {min(rows)}")
    if any(n < 1 or k < 1 for n, k in shapes):
        raise Int4Error("a shape needs at least one output and one input")
    for group in groups:
        if group != -1 and not (group in range(32, 129, 32) or group in range(128, 1025, 128)):
            raise Int4Error(f"group {group}: give a multiple of 32 up to 128, one of 128 up to 1024, or -1")
    for value, known in [*((c, COMPUTE) for c in compute), *((o, OFFSETS) for o in offsets)]:
        if value not in known:
            raise Int4Error(f"{value!r}: give one of {', '.join(known)}")
