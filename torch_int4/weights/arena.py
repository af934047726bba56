"""Memory for many weights, next to each other, so that nearly all of it lies on pages of 2 MiB.

A weight by itself gets such pages only between multiples of 2 MiB: one of 3 MiB gets one such page, or none. Elsewhere
the reads of a decode step stop at the end of every 4 KiB. Weights are packed straight into their places here; nothing
is copied afterwards, and a page of memory is first touched by the thread that will read it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_int4.weights.canonical import Int4Weight, Records
from torch_int4.weights.packed import codes_shape, records_shape, stream_shape

SMALL = 32 << 20  # bytes; what is larger loses little at its ends
LEAST = 1 << 20  # bytes; less is not worth a slab
SLAB = 64 << 20  # bytes of a slab are at least this, if as much is expected
LINE = 64  # bytes; tensors begin at multiples of it
TRIM = 4 << 20  # bytes handed out between two calls of `return_memory`: by so much freed floats may raise the peak


class Size(NamedTuple):
    """The facts known of a packed weight before it is there.

    Attributes:
        out_features: rows.
        in_features: columns.
        group_size: inputs per group, or -1.
        weight_type: the name of its type.
        offsets: None where it has none, "integer" (uint8), or "float" (as the scales).
        records: the kind of scales of two levels, which hold the offsets, or None.
    """

    out_features: int
    in_features: int
    group_size: int
    weight_type: str
    offsets: str | None = None
    records: Records | None = None

    @classmethod
    def of(cls, weight: Int4Weight) -> Size:
        """The size that a canonical weight will have."""
        kind = "integer" if weight.zeros is not None else None if weight.offsets is None else "float"
        sizes = (weight.out_features, weight.in_features, weight.group_size, weight.type.name)
        return cls(*sizes, kind, weight.records)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, of scales in 16 bits, and of offsets."""
        codes = math.prod(codes_shape(self.out_features, self.in_features, self.weight_type))
        if self.records is not None:
            return codes + math.prod(records_shape(self.out_features, self.in_features, self.records))
        stream = math.prod(stream_shape(self.out_features, self.in_features, self.group_size))
        added = {None: 0, "integer": 1, "float": 2}[self.offsets]
        return codes + (2 + added) * stream


class Arena:
    """Hands out memory for packed weights that come one after the other.

    Each type of element has slabs of its own: torch saves no storage that is read as two. A slab is as large as what is
    expected to fill it; where other sizes come than were expected, the next slab begins earlier or later.

    Args:
        sizes: of the weights that will come, in their order.
    """

    def __init__(self, sizes: Iterable[Size]) -> None:
        self._bytes: deque[int] = deque()  # elements of the tensors to come: of uint8, and of floats
        self._floats: deque[int] = deque()
        self._slabs: dict[torch.dtype, tuple[Tensor, int]] = {}  # and how much of them is used
        self._untrimmed = 0
        for size in sizes:
            self._bytes.append(math.prod(codes_shape(size.out_features, size.in_features, size.weight_type)))
            if size.records is not None:
                self._bytes.append(math.prod(records_shape(size.out_features, size.in_features, size.records)))
                continue
            stream = math.prod(stream_shape(size.out_features, size.in_features, size.group_size))
            self._floats.append(stream)
            if size.offsets is not None:
                (self._bytes if size.offsets == "integer" else self._floats).append(stream)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for one tensor, which nothing was written to yet: a `Memory` of `PackedWeight.pack`."""
        coming = self._bytes if dtype == torch.uint8 else self._floats
        nbytes = math.prod(shape) * dtype.itemsize
        self._untrimmed += nbytes
        if self._untrimmed >= TRIM:  # slabs do not grow into what the weights before have freed
            return_memory()
            self._untrimmed = 0
        tensor = _advised(nbytes) if nbytes >= SMALL else self._cut(nbytes, dtype, coming)
        if coming:
            coming.popleft()
        return tensor.view(dtype).view(shape)

    def _cut(self, nbytes: int, dtype: torch.dtype, coming: deque[int]) -> Tensor:
        slab, used = self._slabs.get(dtype, (None, 0))
        if slab is None or used + nbytes > slab.numel():
            total = max(_until_full(coming, dtype), _padded(nbytes))
            if total < LEAST:
                return torch.empty(nbytes, dtype=torch.uint8)
            slab, used = _advised(total), 0
        self._slabs[dtype] = slab, used + _padded(nbytes)
        return slab[used : used + nbytes]


def return_memory() -> None:
    """Give freed pages back: glibc keeps those of middle-sized tensors, as if nothing had been freed."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def _until_full(coming: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes of the next tensors that share a slab."""
    total = 0
    for count in coming:
        size = count * dtype.itemsize
        if size < SMALL:
            total += _padded(size)
        if total >= SLAB:
            break
    return total


def _padded(size: int) -> int:
    return -(-size // LINE) * LINE


def _advised(nbytes: int) -> Tensor:
    memory = torch.empty(nbytes, dtype=torch.uint8)
    torch.ops.torch_int4.advise_huge_pages(memory)
    return memory
