"""Packed weights in a file that processes map into memory and share, and the cache of such files.

A file is safetensors: of each weight `packed`, `packed_scales`, `packed_offsets` and `perm`, each beginning at a
multiple of 64 bytes, and the sizes and types of the weights in the metadata. It holds no instruction of any processor,
so that one file serves all of them. Mapped weights are read from the disk when they are first used,
stay in the page cache for every process, and can be dropped from it: a model may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.support.atomic import new_file, put_in_place, replaced_file
from torch_int4.weights.packed import FIELDS, PackedWeight

LAYOUT = "torch_int4 panels P16 1"  # changes with the packed layout
VARIABLE = "TORCH_INT4_PANELS"
_ALIGNMENT = 64
_PAGE = 4096
_ENTRY = 640  # bytes of header that a linear may need, besides four times its name
_DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
_BY_CODE = {code: dtype for dtype, code in _DTYPES.items()}
_SIZES = ("out_features", "in_features", "group_size", "weight_type")


def cache_folder() -> Path | None:
    """Where panels are kept between runs, as `TORCH_INT4_PANELS` says: a folder, or 1 for one in the user's cache.

    Unset, empty or 0: nowhere.
    """
    value = os.environ.get(VARIABLE, "")
    if value in ("", "0"):
        return None
    return default_folder() if value == "1" else Path(value).expanduser()


def default_folder() -> Path:
    """`torch_int4/panels` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "torch_int4" / "panels"


class PanelWriter:
    """Writes packed weights to a file one after the other; the file gets its name when it is complete.

    Args:
        folder: where; made if it is not there.
        name: of the file; None for one without a name, which is gone when the last process that maps it ends.
        names: of the linears that may come, which the header is sized for.
    """

    def __init__(self, folder: Path, name: str | None, names: Iterable[str]) -> None:
        self.folder = folder
        room = _PAGE + sum(_ENTRY + 8 * len(name.encode()) for name in names)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = new_file(folder)
        except OSError as error:
            raise trouble(folder, error) from error
        self._start = -(-room // _PAGE) * _PAGE
        self._header: dict[str, Any] = {}
        self._shapes: dict[str, dict[str, Any]] = {}
        self._final = None if name is None else folder / name
        self._partial: Path | None = partial
        self._file: IO[bytes] = partial.open("w+b")
        self._file.seek(self._start)

    def add(self, name: str, weight: PackedWeight) -> None:
        """Write one weight, by the name of its linear."""
        for field, tensor in weight.tensors().items():
            if tensor is not None:
                self._write(f"{name}.{field}", tensor)
        self._shapes[name] = {field: getattr(weight, field) for field in _SIZES}

    def _write(self, key: str, tensor: Tensor) -> None:
        begin = self._file.tell() - self._start
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        self._file.write(memoryview(data.numpy().data))
        end = begin + data.numel()
        self._header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        missing = -end % _ALIGNMENT
        if missing:  # the format allows no gaps
            self._file.write(bytes(missing))
            self._header[f".{end}"] = {"dtype": "U8", "shape": [missing], "data_offsets": [end, end + missing]}

    def finish(self) -> dict[str, PackedWeight]:
        """Complete the file, give it its name, and return its weights by name, mapped.

        Raises:
            OSError: the disk is full, or the like.
        """
        metadata = {"format": LAYOUT, "linears": json.dumps(self._shapes)}
        text = json.dumps({"__metadata__": metadata, **self._header}).encode()
        if len(text) > self._start - 8:
            raise Int4Error(f"{self._partial}: its header needs {len(text)} bytes, and {self._start - 8} were planned")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._start - 8) + text.ljust(self._start - 8))
        self._file.flush()
        assert self._partial is not None
        if self._final is None:
            weights = map_file(self._partial)
            os.unlink(self._partial)
            self._partial = None
        else:
            put_in_place(self._partial, self._final)
            self._partial = None  # from here on there is nothing to discard, whatever fails
            weights = map_file(self._final)
        self._file.close()
        return weights

    def discard(self) -> None:
        """Remove what `finish` has not completed."""
        self._file.close()
        if self._partial is not None:
            os.unlink(self._partial)
            self._partial = None


def map_file(path: str | os.PathLike[str]) -> dict[str, PackedWeight]:
    """The weights of a file by name, mapped and not read; writing to them would copy the page.

    Raises:
        Int4Error: it is no such file, is damaged, or was written by a version with another layout.
    """
    where = os.fspath(path)
    try:
        with safe_open(where, framework="pt") as checked:  # a well-kept reader looks at every offset
            metadata = checked.metadata() or {}
        if metadata.get("format") != LAYOUT:
            raise ValueError(f"it holds {metadata.get('format')!r}, not {LAYOUT!r}")
        with open(where, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(size))
            memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        shapes = json.loads(metadata["linears"])
        return {name: _weight(name, sizes, header, memory, 8 + size) for name, sizes in shapes.items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Int4Error(f"{where}: cannot be mapped ({error}); remove it, and it will be made again") from error


def _weight(name: str, sizes: dict[str, Any], header: dict[str, Any], memory: mmap.mmap, start: int) -> PackedWeight:
    entries = [header.get(f"{name}.{field}") for field in FIELDS]
    tensors: list[Any] = [None if entry is None else _tensor(entry, memory, start) for entry in entries]
    return PackedWeight(*tensors, *(sizes[field] for field in _SIZES)).check()


def _tensor(entry: dict[str, Any], memory: mmap.mmap, start: int) -> Tensor:
    dtype, (begin, end) = _BY_CODE[entry["dtype"]], entry["data_offsets"]
    count = (end - begin) // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start + begin).view(entry["shape"])


def trouble(folder: Path, error: OSError) -> Int4Error:
    """The error for a folder that cannot be written."""
    return Int4Error(
        f"{folder}: packed weights cannot be kept there ({error}); make room, or choose another folder by {VARIABLE} "
        "or XDG_CACHE_HOME"
    )


def key_of(files: Iterable[str], facts: Any, folder: Path) -> str:
    """The name of the panels of a checkpoint: a hash of the contents of its files and of what is made of them.

    Args:
        files: of the checkpoint. Their hashes are remembered in `folder`, by path, size and times.
        facts: anything that JSON can hold.

    Raises:
        Int4Error: the folder cannot be written, or a file not be read.
    """
    try:
        digests = [_digest(os.path.realpath(file), folder) for file in files]
    except OSError as error:
        raise trouble(folder, error) from error
    return hashlib.sha256(json.dumps([LAYOUT, digests, facts], sort_keys=True).encode()).hexdigest()


def _digest(file: str, folder: Path) -> str:
    status = os.stat(file)
    stamp = [file, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    known = folder / "digests" / hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    try:
        return known.read_text()
    except OSError:
        pass
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    known.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(known) as partial:
        partial.write_text(digest.hexdigest())
    return digest.hexdigest()


def _blocks(file: str) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(1 << 22))
    with open(file, "rb", buffering=0) as source:
        while count := source.readinto(buffer):
            yield buffer[:count]
