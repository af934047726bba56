"""The tensors of a checkpoint's safetensors files, read one at a time and never mapped into memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.formats.parts.safetensors import open_safetensors


class Source:
    """The tensors of several safetensors files by name.

    A mapped file would count towards the memory of the process with every page that is read, so files are read with
    ordinary system calls where this version of safetensors can.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self.files = [os.fspath(file) for file in files]
        self._handles: dict[str, Any] = {}
        self._file: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            for key, entry in open_safetensors(file).entries.items():  # checks the header
                if key in self._file:
                    raise Int4Error(f"{key}: is both in {self._file[key]} and in {file}; the checkpoint is damaged")
                self._file[key], self._shapes[key] = file, entry.shape
            with _named(file):
                self._handles[file] = _open(file)

    @staticmethod
    def serves(files: Sequence[Any] | None) -> bool:
        """Whether all files are safetensors files on this machine."""
        return bool(files) and all(os.fspath(file).endswith(".safetensors") for file in files or ())

    def __contains__(self, key: object) -> bool:
        return key in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def file(self, key: str) -> str:
        """The file that holds a tensor."""
        return self._file[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape that the header of the file states."""
        return self._shapes[key]

    def read(self, key: str) -> Tensor:
        """A tensor, in memory of its own.

        Raises:
            Int4Error: naming the tensor and its file.
        """
        file = self._file[key]
        with _named(file, key):
            tensor: Tensor = self._handles[file].get_tensor(key)
        return tensor

    def close(self) -> None:
        """Lets go of the files."""
        self._handles.clear()


def _open(file: str) -> Any:
    try:
        return safe_open(file, framework="pt", backend="pread")
    except TypeError:  # before safetensors 0.8
        return safe_open(file, framework="pt")


@contextlib.contextmanager
def _named(file: str, key: str | None = None) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        where = file if key is None else f"{key} in {file}"
        raise Int4Error(f"{where}: cannot be read ({error}); fetch the file again") from error
