"""Memory for many weights, next to each other, so that nearly all of it lies on pages of 2 MiB.

A weight gets such pages where it is packed, but only between multiples of 2 MiB: one of 3 MiB by itself gets one such
page, or none. Elsewhere the reads of a decode step stop at the end of every 4 KiB.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable

import torch

from torch_int4.nn.linear import PACKED, Int4Linear

SMALL = 32 << 20  # bytes; what is larger loses little at its ends
LEAST = 1 << 20  # bytes; less is not worth moving
SLAB = 64 << 20  # bytes of a piece of memory: more than this, and one weight, is never held twice
LINE = 64  # bytes; weights begin at multiples of it

_Place = tuple[Int4Linear, str, int]  # a buffer of a linear, and its bytes


def gather(linears: Iterable[Int4Linear]) -> int:
    """Moves the packed weights of linears, in the given order, into shared memory; the bytes that were moved.

    What lies in shared memory already stays there, and so does what is mapped from a file. Each type has memory of its
    own: torch saves no storage that is read as two.
    """
    waiting: dict[torch.dtype, list[_Place]] = {}
    moved = 0
    for linear in linears:
        for name in () if linear.mapped else PACKED:
            tensor = linear._buffers[name]
            if tensor is None or tensor.nbytes >= SMALL or not tensor.is_cpu:
                continue
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                continue
            places = waiting.setdefault(tensor.dtype, [])
            places.append((linear, name, tensor.nbytes))
            if sum(_padded(size) for _, _, size in places) >= SLAB:
                moved += _move(waiting.pop(tensor.dtype))
    return moved + sum(map(_move, waiting.values()))


def return_memory() -> None:
    """Give freed pages back: glibc keeps those of middle-sized tensors, as if nothing had been freed."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def _padded(size: int) -> int:
    return -(-size // LINE) * LINE


def _move(places: list[_Place]) -> int:
    used = sum(_padded(size) for _, _, size in places)
    if used < LEAST:
        return 0
    slab = torch.empty(used, dtype=torch.uint8)
    torch.ops.torch_int4.advise_huge_pages(slab)
    begin = 0
    for linear, name, size in places:
        old = linear._buffers[name]
        assert old is not None
        linear._buffers[name] = slab[begin : begin + size].view(old.dtype).view(old.shape).copy_(old)
        begin += _padded(size)
    return_memory()  # after each slab: at the end would be too late for the peak
    return used
