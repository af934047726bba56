"""The door for a checkpoint's folder: config.json, index and shards, checked before use. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.formats.parts.safetensors import Entry, SafetensorsFile, open_safetensors, parse_json, regular_file_size

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON = 64 << 20
# where tools put the settings of a quantized model, besides config.json
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")


class Checkpoint:
    """The tensors of a checkpoint, whatever its shards; made by `open_checkpoint`."""

    def __init__(self, folder: Path, files: dict[str, SafetensorsFile], where: dict[str, str]) -> None:
        self.folder, self.files, self._where = folder, files, where

    def __contains__(self, key: object) -> bool:
        return key in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def file(self, key: str) -> str:
        """The name of the file that holds a tensor."""
        if key not in self._where:
            raise Int4Error(f"{self.folder}: holds no tensor {key!r}")
        return self._where[key]

    def entry(self, key: str) -> Entry:
        """dtype, shape and place of a tensor, without reading it."""
        return self.files[self.file(key)].entries[key]

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        return self.files[self.file(key)].read(key)

    def metadata(self) -> dict[str, str]:
        """The texts in the headers of all files."""
        return {key: text for file in self.files.values() for key, text in file.metadata.items()}

    def close(self) -> None:
        """Let go of all memory maps."""
        for file in self.files.values():
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
    name = _single_name(folder)
    file = open_safetensors(folder / name)
    return Checkpoint(folder, {name: file}, dict.fromkeys(file.entries, name))


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json as a table.

    Raises:
        Int4Error: it is missing or damaged.
    """
    return read_json(Path(folder) / "config.json")


def read_quantization_config(folder: str | Path) -> dict[str, Any] | None:
    """How a checkpoint is quantized: from config.json, or from the file that older tools wrote; None for a float one.

    Raises:
        Int4Error: a file is damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    found = config.get("quantization_config")
    text = config.get("text_config")
    if found is None and isinstance(text, dict):
        found = text.get("quantization_config")
    if found is not None:
        if not isinstance(found, dict):
            raise Int4Error(f"config.json: quantization_config must be a table, got {type(found).__name__}")
        return found
    for name in QUANTIZATION_FILES:
        if (folder / name).is_file():
            table = read_json(folder / name)
            table.setdefault("quant_method", "awq" if name == "quant_config.json" else "gptq")
            return table
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
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(set(index.values())):
        if not (folder / name).exists():
            missing = next(key for key, shard in index.items() if shard == name)
            raise Int4Error(f"{name}: this shard is missing; it should hold {missing} and others ({folder})")
        files[name] = open_safetensors(folder / name)
    for key, name in index.items():
        if key not in files[name].entries:
            raise Int4Error(f"{INDEX}: says that {name} holds {key}, but it does not")
    for name, file in files.items():
        for key in file.entries:
            if index.get(key, name) != name:
                raise Int4Error(f"{name}: {key}: is also in {index[key]}, where the index says that it is")
    return Checkpoint(folder, files, dict(index))


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
