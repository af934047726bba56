"""The door for safetensors files: the header is checked before anything is allocated or handed to a loader.

The file is 8 bytes with the length of a JSON header, the header, and the tensors' bytes without holes:
    {"name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {"key": "text"}}
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_int4.errors import Int4Error

MAX_HEADER = 32 << 20  # 200,000 tensors with long names take less
# bits per element
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class Entry:
    """What a header says about one tensor; `begin` and `end` in bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass
class SafetensorsFile:
    """A file whose header has been checked; tensors are read by the safetensors library, one at a time."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    _handle: Any = None

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        if key not in self.entries:
            raise Int4Error(f"{self.path.name}: has no tensor {key!r}")
        if self._handle is None:
            from safetensors import safe_open

            self._handle = safe_open(str(self.path), framework="pt", device="cpu")
        try:
            tensor: Tensor = self._handle.get_tensor(key)
        except Exception as error:  # the library's own, and types that this torch does not have
            raise Int4Error(f"{self.path.name}: {key}: cannot be read: {error}") from error
        return tensor

    def close(self) -> None:
        """Let go of the memory map."""
        self._handle = None


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Check a file's header.

    Raises:
        Int4Error: naming the file, and the tensor where one is wrong.
    """
    path = Path(path)
    size = regular_file_size(path)
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2 or length > size - 8:
            raise Int4Error(f"{path.name}: is cut off, or no safetensors file: {size} bytes, header of {length}")
        if length > MAX_HEADER:
            raise Int4Error(f"{path.name}: its header of {length} bytes is longer than the {MAX_HEADER} accepted")
        text = stream.read(length)
    header = parse_json(text, path.name)
    metadata = _check_metadata(header.pop("__metadata__", {}), path.name)
    entries = {key: _check_entry(value, size - 8 - length, f"{path.name}: {key}") for key, value in header.items()}
    _check_layout(entries, size - 8 - length, path.name)
    return SafetensorsFile(path, entries, metadata)


def regular_file_size(path: Path) -> int:
    """Bytes of a file. Links are followed, as the hub's cache is made of them; devices and pipes are refused."""
    try:
        if not path.is_file():
            reason = "is not a regular file" if path.exists() else "does not exist"
            raise Int4Error(f"{path.name}: {reason} ({path})")
        return path.stat().st_size
    except OSError as error:
        raise Int4Error(f"{path.name}: cannot be read: {error}") from error


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """A JSON table without repeated keys.

    Raises:
        Int4Error: it is none; the message starts with `name`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise Int4Error(f"{name}: holds {double!r} twice")
        return table

    def constant(word: str) -> float:
        raise Int4Error(f"{name}: holds {word}, which is no JSON")

    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except Int4Error:
        raise
    except (ValueError, RecursionError) as error:
        raise Int4Error(f"{name}: holds no valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise Int4Error(f"{name}: must hold a JSON table, got {type(table).__name__}")
    return table


def _check_metadata(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise Int4Error(f"{name}: __metadata__ must be a table of texts")
    return value


def _check_entry(value: Any, available: int, where: str) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise Int4Error(f"{where}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Int4Error(f"{where}: has an unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(_is_size(extent) for extent in shape):
        raise Int4Error(f"{where}: its shape must be a list of at most 16 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise Int4Error(f"{where}: its data_offsets must be two positions")
    begin, end = offsets
    if begin > end or end > available:
        raise Int4Error(f"{where}: lies at {begin}..{end}, and the file holds {available} bytes of tensors")
    bits = DTYPES[dtype]
    for extent in shape:
        bits *= extent  # of any length in Python: a huge shape cannot wrap around
    if bits != 8 * (end - begin):
        raise Int4Error(f"{where}: {dtype} {shape} needs {bits // 8} bytes, and the file gives it {end - begin}")
    return Entry(dtype, tuple(shape), begin, end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _check_layout(entries: dict[str, Entry], available: int, name: str) -> None:
    position, before = 0, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            raise Int4Error(f"{name}: {key}: overlaps {before} (it begins at {entry.begin}, before {position})")
        if entry.begin > position:
            raise Int4Error(f"{name}: {key}: there is a hole of {entry.begin - position} bytes before it")
        position, before = entry.end, key
    if position != available:
        raise Int4Error(f"{name}: holds {available} bytes of tensors, and its header describes {position}")
