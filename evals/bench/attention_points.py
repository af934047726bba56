"""The points of the attention bench: steps, prompts and appends at contexts and geometries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch_int4 import Int4Error

GEOMETRIES = ((32, 32, 128), (32, 8, 128))  # query heads, kv heads, head size: Llama-2-7B, and one with groups of 4
CONTEXTS = (512, 4096, 16384)
PROMPTS = (512, 2048)
CACHED = (0, 512, 4096, 16384)
KINDS = ("decode", "prefill", "append")


@dataclass(frozen=True, order=True)
class Point:
    """One layer's attention for one sequence: `tokens` queries at the end of `context` tokens."""

    kind: str  # one of KINDS; append is the step of rotary_append, with `context` tokens in the cache before
    heads: int
    kv_heads: int
    dim: int
    context: int
    tokens: int

    @property
    def label(self) -> str:
        """For people: ``decode 4096, 32/8x128``."""
        return f"{self.kind} {self.context}, {self.heads}/{self.kv_heads}x{self.dim}"


def select(
    *,
    kinds: Sequence[str] = (),
    contexts: Sequence[int] = (),
    geometries: Sequence[tuple[int, int, int]] = (),
) -> list[Point]:
    """The points of KINDS at the standard contexts and geometries; a filter replaces those.

    Raises:
        Int4Error: for an unknown kind, or heads that kv heads do not divide.
    """
    points = []
    for kind in kinds or KINDS:
        if kind not in KINDS:
            raise Int4Error(f"{kind!r}: give one of {', '.join(KINDS)}")
        standard = {"decode": CONTEXTS, "prefill": PROMPTS, "append": CACHED}[kind]
        for (heads, kv_heads, dim), context in itertools.product(geometries or GEOMETRIES, contexts or standard):
            if min(heads, kv_heads, dim) < 1 or heads % kv_heads or dim % 2:
                raise Int4Error(f"geometry {heads}/{kv_heads}x{dim}: heads must be a multiple of kv heads, sizes even")
            if context < (kind != "append"):
                raise Int4Error("a context must be 1 or more")
            points.append(Point(kind, heads, kv_heads, dim, context, context if kind == "prefill" else 1))
    return points


def parse_geometry(text: str) -> tuple[int, int, int]:
    """``32/8x128`` as (query heads, kv heads, head size)."""
    left, _, dim = text.lower().partition("x")
    heads, _, kv_heads = left.partition("/")
    parts = (heads, kv_heads or heads, dim)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise Int4Error(f"geometry {text!r}: give heads/kv_heads x head size, as in 32/8x128")
    return int(parts[0]), int(parts[1]), int(parts[2])
