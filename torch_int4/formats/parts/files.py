"""The door for a checkpoint's folder: index and shards, checked before use. Nothing is ever unpickled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.formats.parts.safetensors import SafetensorsFile, open_safetensors, parse_json, regular_file_size

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON = 64 << 20
# where tools of before put the settings of a quantized model that are in config.json today, and their method
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "quantization_config.json": "gptq"}


class Checkpoint:
    """The tensors of several safetensors files by name, read one at a time and never mapped into memory.

    Raises:
        Int4Error: a file is damaged, or two of them hold a tensor of the same name.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self.files = [os.fspath(file) for file in files]
        self._opened: dict[str, SafetensorsFile] = {}
        self._file: dict[str, str] = {}
        for file in self.files:
            self._opened[file] = open_safetensors(file)
            for key in self._opened[file].shapes:
                if key in self._file:
                    other = Path(self._file[key]).name
                    raise Int4Error(f"{file}: {key}: is also in {other}, so the checkpoint is damaged")
                self._file[key] = file

    @staticmethod
    def serves(files: Sequence[Any] | None) -> bool:
        """Whether all files are safetensors files on this machine."""
        return bool(files) and all(os.fspath(file).endswith(".safetensors") for file in files or ())

    def __contains__(self, key: object) -> bool:
        return key in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def file(self, key: str) -> str:
        """The file that holds a tensor."""
        return self._file_of(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape that the header of the file states."""
        return self._opened[self._file_of(key)].shapes[key]

    def _file_of(self, key: str) -> str:
        if key not in self._file:
            raise Int4Error(f"{', '.join(self.files)}: no tensor {key!r} is there")
        return self._file[key]

    def read(self, key: str, part: int | None = None) -> Tensor:
        """One tensor, or one part of it along its first dimension, on the CPU, in memory of its own.

        Raises:
            Int4Error: naming the tensor and its file.
        """
        return self._opened[self._file_of(key)].read(key, part)

    def stored_name(self, key: str) -> str:
        """The name that the files have for the tensor which this one is taken from."""
        return key

    def close(self) -> None:
        """Let go of all files."""
        for file in self._opened.values():
            file.close()


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Check the index and every shard's header.

    Raises:
        Int4Error: naming the file, and the tensor where one is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Int4Error(f"{folder}: is not a folder; give the folder of a checkpoint (models are not downloaded here)")
    if (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        return _open_sharded(folder)
    return Checkpoint([folder / _single_name(folder)])


def read_quantization_file(folder: str | Path) -> dict[str, Any] | None:
    """How a checkpoint is quantized, from a file beside config.json as tools wrote it once; None without one.

    Raises:
        Int4Error: the file is damaged.
    """
    for name, method in QUANTIZATION_FILES.items():
        if (Path(folder) / name).exists():
            return {"quant_method": method, **read_json(Path(folder) / name)}
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table."""
    size = regular_file_size(path)
    if size > MAX_JSON:
        raise Int4Error(f"{path.name}: has {size} bytes, and at most {MAX_JSON} are accepted")
    return parse_json(path.read_bytes(), path.name)


def _open_sharded(folder: Path) -> Checkpoint:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise Int4Error(f"{INDEX}: weight_map must be a table of tensors and files")
    for key, name in index.items():
        _check_shard_name(key, name)
        if not (folder / name).exists():
            raise Int4Error(f"{name}: this shard is missing; it should hold {key} and others ({folder})")
    found = Checkpoint([folder / name for name in sorted(set(index.values()))])
    for key, name in index.items():
        if key not in found or found.file(key) != str(folder / name):
            raise Int4Error(f"{INDEX}: says that {name} holds {key}, but it does not")
    return found


def _check_shard_name(key: str, name: Any) -> None:
    plain = isinstance(name, str) and name.endswith(".safetensors") and "\0" not in name and "\\" not in name
    if not plain or Path(name).name != name or name.startswith("."):
        raise Int4Error(f"{INDEX}: {key}: its file must be a plain name that ends in .safetensors, got {name!r:.80}")


def _single_name(folder: Path) -> str:
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return SINGLE
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(names) == 1:
        return names[0]
    if names:
        raise Int4Error(
            f"{folder}: holds {len(names)} .safetensors files and no {INDEX} that says which tensor is where"
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise Int4Error(
            f"{folder}: holds pickled weights only, which can run code when they are read. Convert them to safetensors "
            "where you trust them: AutoModelForCausalLM.from_pretrained(d).save_pretrained(new)"
        )
    raise Int4Error(f"{folder}: holds no {SINGLE} and no {INDEX}")
