"""State of a calibration on disk after each finished block, so that an interrupted run ends with the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.support.atomic import replaced_file
from torch_int4.weights.canonical import TENSORS, Int4Weight
from torch_int4.weights.result import Extra, Result

FORMAT = 2  # raise it when what is saved, or how it is computed, changes


class Progress:
    """A folder with one file per finished block, and the states in front of the next one.

    Files are written under another name and renamed, so that a run that is killed leaves whole files only. A folder
    that belongs to another model, config or data is refused instead of overwritten.

    Args:
        folder: made if it is not there.
        fingerprint: of the run.
        extras: the kinds of extras that results may have, by name.
    """

    def __init__(self, folder: str | Path, fingerprint: str, extras: Mapping[str, type[Extra]] | None = None) -> None:
        self.folder, self.extras = Path(folder), dict(extras or {})
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "calibration.json"
        if note.exists():
            found = json.loads(note.read_text(encoding="utf-8")).get("fingerprint")
            if found != fingerprint:
                raise Int4Error(
                    f"calibration: {str(self.folder)!r} holds the state of another run (other model, config, data or "
                    "version); give another folder, or delete it"
                )
        else:
            with replaced_file(note) as partial:
                partial.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")

    @property
    def done(self) -> int:
        """Blocks that are finished: all of them are there, and the states behind the last of them too."""
        found = [int(path.stem.rpartition("-")[2]) for path in self.folder.glob("states-*.safetensors")]
        usable = [n for n in found if all(self._block(i).exists() for i in range(n))]
        return max(usable, default=0)

    def save(
        self, index: int, results: Mapping[str, Result], rest: dict[str, Tensor], states: dict[str, Tensor]
    ) -> None:
        """Write block `index` and the states behind it; the states in front of it are deleted afterwards."""
        tensors = {f"rest|{name}": tensor for name, tensor in rest.items()}
        notes = {}
        for name, result in results.items():
            weight = result.weight
            plain = {"group_size": weight.group_size, "bits": weight.bits, "codebook": weight.codebook}
            notes[name] = json.dumps({**plain, "extras": list(result.extras)})
            for part in TENSORS:
                value = getattr(weight, part)
                if value is not None:
                    tensors[f"{part}|{name}"] = value
            for extra, made in result.extras.items():
                tensors.update({f"{extra}.{part}|{name}": value for part, value in made.tensors().items()})
        _write(tensors, self._block(index), notes)
        _write(states, self._states(index + 1), {})
        self._states(index).unlink(missing_ok=True)

    def load(self, index: int) -> tuple[dict[str, Result], dict[str, Tensor]]:
        """Results of a finished block's linears, and its other parameters."""
        from safetensors import safe_open

        path = self._block(index)
        with safe_open(str(path), framework="pt") as file:
            notes = dict(file.metadata() or {})
        tensors = load_file(str(path))
        results = {}
        for name, note in notes.items():
            plain = json.loads(note)
            extras = {extra: self._extra(extra, name, tensors) for extra in plain.pop("extras")}
            parts: Any = {part: tensors[f"{part}|{name}"] for part in TENSORS if f"{part}|{name}" in tensors}
            results[name] = Result(Int4Weight(**parts, **plain).validate(name), extras)
        rest = {key[len("rest|") :]: value for key, value in tensors.items() if key.startswith("rest|")}
        return results, rest

    def _extra(self, extra: str, name: str, tensors: dict[str, Tensor]) -> Extra:
        kind = self.extras[extra]
        return kind(**{part: tensors[f"{extra}.{part}|{name}"] for part in kind.TENSORS})

    def states(self) -> dict[str, Tensor]:
        """The states behind the last finished block."""
        return load_file(str(self._states(self.done)))

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def _states(self, index: int) -> Path:
        return self.folder / f"states-{index:04d}.safetensors"


def fingerprint(config: object, windows: Tensor, tensors: Iterable[tuple[str, Tensor]], *notes: object) -> str:
    """A hash of everything that the result depends on. Of weights, some values each are taken."""
    digest = hashlib.sha256(f"{FORMAT} {torch.__version__}".encode())
    options = [(f.name, getattr(config, f.name)) for f in fields(config)]  # type: ignore[arg-type]
    digest.update(repr((options, notes)).encode())
    digest.update(windows.contiguous().numpy().tobytes())
    for name, tensor in tensors:
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)].float().contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _write(tensors: dict[str, Tensor], path: Path, notes: dict[str, str]) -> None:
    with replaced_file(path) as partial:
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, str(partial), notes)
