"""Engines that run whole models, one file each, found by name.

A file here defines `ENGINES`, classes as `Engine` below describes them. They import their library only inside
functions: a missing one is told, never an error. A name that starts with an underscore is shared code.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch_int4.evals.bench.shapes import Shape, find


@dataclass(frozen=True)
class Spec:
    """The settings that every engine of a run gets.

    Attributes:
        shape: name of the model's shape.
        threads: to compute with.
        context: tokens that a sequence may reach.
        batch: sequences at once at most.
        folder: where files of this shape may be written and found again.
        options: for this package's engine: group_size, dtype, compute, kv_cache, head.
    """

    shape: str
    threads: int
    context: int
    batch: int
    folder: Path
    options: dict[str, Any]

    @property
    def model(self) -> Shape:
        """The shape itself."""
        return find(self.shape)


class Engine(Protocol):
    """A model in some library, and a KV cache that grows as it is used."""

    name: str
    weight_bytes: int  # that one token reads: linears and head with their scales, not the embedding table
    batches: bool  # whether several sequences can run at once

    def __init__(self, spec: Spec) -> None: ...

    @staticmethod
    def missing(spec: Spec) -> str | None:
        """Why the engine cannot run this here, and what to do about it; None if it can."""

    @staticmethod
    def memory(spec: Spec) -> int:
        """Bytes that it will need at most, roughly, building included."""

    @staticmethod
    def prepare(spec: Spec) -> None:
        """Writes the files that it loads, if they are not there yet."""

    def clear(self, batch: int) -> None:
        """Forgets all tokens; from now on `batch` sequences run at once."""

    def extend(self, tokens: Sequence[int], new: int) -> list[float]:
        """Appends tokens to every sequence, then generates `new` greedily; seconds to each of those."""

    def version(self) -> str:
        """Of the library, and what it computes with."""


def available() -> dict[str, Any]:
    """Engine classes by name, in the order of their files."""
    classes: list[Any] = []
    for found in pkgutil.iter_modules(__path__):
        if not found.name.startswith("_"):
            classes += importlib.import_module(f"{__name__}.{found.name}").ENGINES
    return {engine.name: engine for engine in classes}


def not_installed(*modules: str, install: str) -> str | None:
    """The packages to install if one of the modules is not there, for `Engine.missing`."""
    import importlib.util

    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed: {install}" if absent else None


def rows(tokens: Sequence[int], batch: int, vocabulary: int) -> list[list[int]]:
    """The tokens once for each sequence, shifted so that no two sequences are the same."""
    return [[(token + row) % vocabulary for token in tokens] for row in range(batch)]
