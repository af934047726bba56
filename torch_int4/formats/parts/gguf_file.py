"""The door for GGUF files: every count, length and offset of the header is checked before anything is allocated.

The header is: magic "GGUF", version, number of tensors, number of metadata entries; the entries (key, type, value); the
tensors (name, dimensions, type, offset); then, aligned, the tensors' bytes. Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.formats.gguf import require_gguf
from torch_int4.formats.parts.safetensors import regular_file_size

VERSIONS = (2, 3)
MAX_ENTRIES, MAX_TENSORS, MAX_ARRAY, MAX_STRING = 1 << 16, 1 << 20, 1 << 24, 1 << 24
MAX_DIMENSIONS = 4
MAX_KEPT = 1024  # numbers of an array
# metadata types: struct formats of numbers by their number; 8 is a string, 9 an array
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: the name of its type, its shape as torch has it, and its place in bytes."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GgufFile:
    """A file whose header has been checked. `metadata` holds single values, and short arrays of numbers as tuples;
    others are counted, not kept.

    `spans` are the first and the last place, in bytes, of each entry of the metadata.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    spans: dict[str, tuple[int, int]]

    def read(self, name: str, part: int | None = None) -> Tensor:
        """The bytes of one tensor, or of one part along its first dimension: uint8 `[..., bytes per row]`, a copy."""
        if name not in self.tensors:
            raise Int4Error(f"{self.path.name}: has no tensor {name!r}")
        entry = self.tensors[name]
        count, shape = entry.end - entry.begin, entry.shape
        if part is not None:
            count, shape = count // shape[0], shape[1:]
        with self.path.open("rb") as stream:
            stream.seek(entry.begin + (part or 0) * count)
            values = np.fromfile(stream, dtype=np.uint8, count=count)
        if values.size != count:
            raise Int4Error(f"{self.path.name}: {name}: is cut off; the file has changed since it was opened")
        return torch.from_numpy(values).reshape(*shape[:-1], -1)


def open_gguf(path: str | Path) -> GgufFile:
    """Check a file's header.

    Raises:
        Int4Error: naming the file, and the tensor or entry where one is wrong.
    """
    path = Path(path)
    size = regular_file_size(path)
    if size < 24:
        raise Int4Error(f"{path.name}: is cut off, or no GGUF file: it has {size} bytes")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, path.name)
        version, tensors, entries = _preamble(reader)
        metadata, spans = _metadata(reader, entries)
        table = _tensor_table(reader, tensors)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
            raise Int4Error(f"{path.name}: general.alignment is {alignment!r}; it must be a power of two")
        start = -(-reader.position // alignment) * alignment
    return GgufFile(path, version, metadata, _place(table, start, size, alignment, path.name), spans)


class _Reader:
    """A position in the header; every read says what it was for when the file ends."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data, self.name, self.position = data, name, 0

    def number(self, form: str, what: str) -> Any:
        width = struct.calcsize("<" + form)
        self.need(width, what)
        (value,) = struct.unpack_from("<" + form, self.data, self.position)
        self.position += width
        return value

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        if length > MAX_STRING:
            raise Int4Error(f"{self.name}: {what}: a text of {length} bytes is longer than the {MAX_STRING} accepted")
        self.need(length, what)
        raw = self.data[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Int4Error(f"{self.name}: {what}: is no UTF-8 text") from error

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.position += count

    def need(self, count: int, what: str) -> None:
        if count > len(self.data) - self.position:
            raise Int4Error(f"{self.name}: {what}: the file ends before it; it is cut off or damaged")


def _preamble(reader: _Reader) -> tuple[int, int, int]:
    if reader.data[:4] != b"GGUF":
        raise Int4Error(f"{reader.name}: is no GGUF file: it begins with {reader.data[:4]!r}")
    reader.position = 4
    version = reader.number("I", "version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        reason = "is for big-endian machines" if swapped in VERSIONS else f"has GGUF version {version}"
        raise Int4Error(f"{reader.name}: {reason}; versions 2 and 3 for little-endian ones are read")
    tensors, entries = reader.number("Q", "number of tensors"), reader.number("Q", "number of metadata entries")
    if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
        raise Int4Error(f"{reader.name}: declares {tensors} tensors and {entries} metadata entries, which is too many")
    return version, tensors, entries


def _metadata(reader: _Reader, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The values, and the bytes of their entries."""
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(count):
        begin = reader.position
        key = reader.text(f"metadata entry {index}")
        if key in metadata:
            raise Int4Error(f"{reader.name}: holds the metadata entry {key!r} twice")
        metadata[key] = _value(reader, reader.number("I", key), key)
        spans[key] = begin, reader.position
    return metadata, spans


def _value(reader: _Reader, kind: int, key: str) -> Any:
    if kind in NUMBERS:
        return reader.number(NUMBERS[kind], key)
    if kind == STRING:
        return reader.text(key)
    if kind != ARRAY:
        raise Int4Error(f"{reader.name}: {key}: has the unknown type {kind}")
    kind, count = reader.number("I", key), reader.number("Q", key)
    if count > MAX_ARRAY:
        raise Int4Error(f"{reader.name}: {key}: an array of {count} values is longer than the {MAX_ARRAY} accepted")
    if kind in NUMBERS and count <= MAX_KEPT:
        return tuple(reader.number(NUMBERS[kind], key) for _ in range(count))
    if kind in NUMBERS:
        reader.skip(count * struct.calcsize("<" + NUMBERS[kind]), key)
    elif kind == STRING:
        for _ in range(count):
            reader.skip(reader.number("Q", key), key)
    else:
        raise Int4Error(f"{reader.name}: {key}: is an array of the unknown type {kind}")
    return None


def _tensor_table(reader: _Reader, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """(name, shape, type number, offset) of every tensor."""
    table, seen = [], set()
    for index in range(count):
        name = reader.text(f"name of tensor {index}")
        if name in seen:
            raise Int4Error(f"{reader.name}: holds the tensor {name!r} twice")
        seen.add(name)
        dimensions = reader.number("I", name)
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise Int4Error(f"{reader.name}: {name}: has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        shape = tuple(reader.number("Q", name) for _ in range(dimensions))[::-1]  # the fastest one comes first there
        if not all(0 < extent < 1 << 48 for extent in shape):
            raise Int4Error(f"{reader.name}: {name}: has the impossible shape {list(shape)}")
        table.append((name, shape, reader.number("I", name), reader.number("Q", name)))
    return table


def _place(
    table: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int, alignment: int, file: str
) -> dict[str, GgufTensor]:
    gguf = require_gguf(file)
    sizes = {int(kind): (kind.name, *blocks) for kind, blocks in gguf.GGML_QUANT_SIZES.items()}
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in table:
        if number not in sizes:
            raise Int4Error(f"{file}: {name}: has the unknown GGUF type {number}")
        kind, per_block, block_bytes = sizes[number]
        if shape[-1] % per_block:
            raise Int4Error(f"{file}: {name}: has rows of {shape[-1]}, and {kind} holds multiples of {per_block}")
        count = block_bytes
        for extent in (*shape[:-1], shape[-1] // per_block):
            count *= extent
        if offset % alignment or offset > size or count > size - start - offset:
            raise Int4Error(f"{file}: {name}: {count} bytes at offset {offset} do not lie in the file of {size} bytes")
        tensors[name] = GgufTensor(kind, shape, start + offset, start + offset + count)
    ordered = sorted(tensors.items(), key=lambda item: item[1].begin)
    for (before, first), (name, second) in itertools.pairwise(ordered):
        if second.begin < first.end:
            raise Int4Error(f"{file}: {name}: overlaps {before}")
    return tensors
