"""The table of weight types, as the kernels have it (csrc/framework/types.cpp, csrc/kernels/types.h).

Codes are unsigned. A type without a code book has a zero point, the code of weight zero; with one, a code is an index
into its values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch  # noqa: F401 (its libraries have to be loaded before the extension's)

from torch_int4 import _C
from torch_int4.errors import Int4Error


@dataclass(frozen=True)
class WeightType:
    """One row.

    Attributes:
        name: by which operators and files choose it.
        bits: of a code.
        slab_bytes: bytes of 32 inputs of 16 rows, packed.
        zero: the zero point of a weight without zeros or offsets; None with a code book.
        book: the values of the codes, or None.
    """

    name: str
    bits: int
    slab_bytes: int
    zero: int | None
    book: tuple[float, ...] | None

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def largest(self) -> int:
        """The largest code."""
        return self.levels - 1

    @property
    def codebook(self) -> str | None:
        """The name of the code book, which is that of the type, or None."""
        return None if self.book is None else self.name


TYPES = {row[0]: WeightType(*row) for row in _C.weight_types()}
INT4, INT8 = TYPES["int4"], TYPES["int8"]
CODEBOOKS = tuple(name for name, row in TYPES.items() if row.book is not None)  # in the order that files refer to
BITS = tuple(sorted(row.bits for row in TYPES.values() if row.book is None))
_BY_FIELDS = {(row.bits, row.codebook): row for row in TYPES.values()}


def named(name: str) -> WeightType:
    """The type of a name. Raises `Int4Error` for a name that is not in the table."""
    if name not in TYPES:
        raise Int4Error(f"weight_type must be one of {', '.join(TYPES)}; not {name!r}")
    return TYPES[name]


def find(bits: int, codebook: str | None = None) -> WeightType | None:
    """The type of codes of so many bits, with that code book; None where there is none."""
    return _BY_FIELDS.get((bits, codebook))
