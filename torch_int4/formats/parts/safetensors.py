"""The door for safetensors files: everything a header can get wrong is found before a tensor is allocated.

`safetensors.safe_open` checks what decides where bytes are read: the length of the header, its JSON, dtypes, shapes
against offsets, overflows, overlaps, holes, and that tensors fill the file. Checked here is the rest: files that are
none (opening a pipe would wait for ever), and tables that name a tensor or a field twice, or hold unknown fields, which
the library reads in silence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from torch_int4.errors import Int4Error

_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header has been checked; tensors are read by the safetensors library, one at a time.

    Attributes:
        path: where the file is.
        shapes: what the header says of the tensors, by name.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    _handle: Any

    def read(self, key: str, part: int | None = None) -> Tensor:
        """One tensor, or one part of it along its first dimension, on the CPU, in memory of its own.

        Raises:
            Int4Error: naming the tensor and the file.
        """
        if key not in self.shapes:
            raise Int4Error(f"{self.path.name}: has no tensor {key!r}")
        try:
            tensor: Tensor = self._handle.get_tensor(key) if part is None else self._handle.get_slice(key)[part]
        except Exception as error:  # the library's own, and whatever torch says of a type or size that it does not have
            raise Int4Error(f"{self.path.name}: {key}: cannot be read ({error}); fetch the file again") from error
        return tensor

    def close(self) -> None:
        """Let go of the file."""
        self._handle.__exit__(None, None, None)


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Check a file's header.

    Raises:
        Int4Error: naming the file, and the tensor where one is known to be wrong.
    """
    path = Path(path)
    regular_file_size(path)
    try:
        # A mapped file would count towards the memory of the process with every page that is read.
        handle = safe_open(path, framework="pt", backend="pread")
    except Exception as error:  # the library's own, and the system's
        raise Int4Error(
            f"{path.name}: is cut off, damaged, or no safetensors file ({error}); fetch it again"
        ) from error
    with path.open("rb") as stream:
        header = parse_json(stream.read(int.from_bytes(stream.read(8), "little")), path.name)
    header.pop("__metadata__", None)
    for key, entry in header.items():
        if set(entry) != _FIELDS:
            raise Int4Error(f"{path.name}: {key}: needs exactly dtype, shape and data_offsets")
    return SafetensorsFile(path, {key: tuple(entry["shape"]) for key, entry in header.items()}, handle)


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
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise Int4Error(f"{name}: holds {key!r:.80} twice")
            table[key] = value
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
