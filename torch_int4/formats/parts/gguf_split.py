"""GGUF files in parts, `NAME-00001-of-00003.gguf`: any of them stands for all.

The first part has the metadata of the model, every part the tensors that it lists (llama.cpp's gguf-split). Readers of
whole files get one, which is joined of the parts for as long as they need it.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from torch_int4.errors import Int4Error
from torch_int4.formats.gguf import require_gguf
from torch_int4.formats.parts.gguf_file import GgufFile, open_gguf

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_CHUNK = 1 << 24  # bytes that are copied at once


def parts_of(path: str | Path) -> list[Path]:
    """All parts of the model that a file belongs to, in order; the file alone where its name does not say so.

    Raises:
        Int4Error: naming the parts that are not there.
    """
    path = Path(path)
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise Int4Error(f"{path.name}: says that it is part {int(match['number'])} of {count}")
    parts = [path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf") for number in range(1, count + 1)]
    absent = [part.name for part in parts if not part.exists()]
    if absent:
        raise Int4Error(f"{path.name}: is one of {count} parts, and missing in its folder: {', '.join(absent)}")
    return parts


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """The path of one file with all tensors: the one given, or one that is joined of the parts and removed afterwards.

    It takes as much disk as the parts, in their folder, or where that cannot be written, in the one of temporary files.

    Raises:
        Int4Error: a part is missing or damaged, parts do not belong together, or the disk is full.
    """
    parts = parts_of(path)
    if len(parts) == 1:
        yield parts[0]
        return
    files = [open_gguf(part) for part in parts]
    _check(files)
    beside = parts[0].parent
    room = beside if os.access(beside, os.W_OK) else Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix=".joined-", dir=room) as folder:
        joined = Path(folder) / f"{_PART.fullmatch(parts[0].name)['stem']}.gguf"  # type: ignore[index]
        try:
            with joined.open("wb") as stream:
                _join(files, stream)
        except OSError as error:
            raise Int4Error(
                f"{parts[0].name}: its parts cannot be joined in {room} ({error}); make room there, or join them by "
                "llama-gguf-split --merge"
            ) from error
        yield joined


def _check(files: Sequence[GgufFile]) -> None:
    """That the parts say of themselves what their names say."""
    seen: dict[str, str] = {}
    for number, file in enumerate(files):
        for key, want in (("split.no", number), ("split.count", len(files))):
            if file.metadata.get(key, want) != want:
                raise Int4Error(f"{file.path.name}: {key} is {file.metadata[key]!r}, which its name contradicts")
        for name in file.tensors:
            if name in seen:
                raise Int4Error(f"{file.path.name}: holds the tensor {name!r}, which {seen[name]} holds too")
            seen[name] = file.path.name
    total = files[0].metadata.get("split.tensors.count", len(seen))
    if total != len(seen):
        raise Int4Error(f"{files[0].path.name}: declares {total} tensors in all parts, and they hold {len(seen)}")


def _join(files: Sequence[GgufFile], target: IO[bytes]) -> None:
    numbers = require_gguf(files[0].path.name).GGMLQuantizationType
    first, count = files[0], sum(len(file.tensors) for file in files)
    alignment = first.metadata.get("general.alignment", 32)
    kept = [span for key, span in first.spans.items() if not key.startswith("split.")]
    target.write(struct.pack("<4sIQQ", b"GGUF", first.version, count, len(kept)))
    with first.path.open("rb") as source:
        for begin, end in kept:
            _copy(source, begin, end, target)
    offset = 0
    for file in files:
        for name, entry in file.tensors.items():
            text, shape = name.encode(), entry.shape[::-1]
            target.write(struct.pack(f"<Q{len(text)}sI{len(shape)}Q", len(text), text, len(shape), *shape))
            target.write(struct.pack("<IQ", int(numbers[entry.kind]), offset))
            offset += -(-(entry.end - entry.begin) // alignment) * alignment
    for file in files:
        with file.path.open("rb") as source:
            for entry in file.tensors.values():
                target.write(bytes(-target.tell() % alignment))
                _copy(source, entry.begin, entry.end, target)


def _copy(source: IO[bytes], begin: int, end: int, target: IO[bytes]) -> None:
    source.seek(begin)
    while begin < end:
        data = source.read(min(_CHUNK, end - begin))
        if not data:
            raise OSError(f"{source.name} became shorter while it was read")
        begin += target.write(data)
