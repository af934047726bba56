"""Checkpoint formats, one file each: every format becomes `Int4Weight`, and no other part knows their names.

A file sets `FORMAT`, an instance of a subclass of `Format` (`_format.py`).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.weights.canonical import Int4Weight

__all__ = ["Format", "Settings", "available", "convert_module", "dense_module", "find", "get", "holds"]


def available() -> tuple[str, ...]:
    """The names of all formats, in alphabetical order."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg))


@functools.cache
def get(name: str) -> Format:
    """The format of that name.

    Raises:
        Int4Error: there is none; the message lists those that exist.
    """
    if name not in available():
        raise Int4Error(f"unknown checkpoint format {name!r}; there are: {', '.join(available())}")
    return importlib.import_module(f"{__name__}.{name}").FORMAT


def find(config: Mapping[str, Any]) -> Format:
    """The format of a `quantization_config`, as config.json holds it.

    Raises:
        Int4Error: none is recognised.
    """
    if not isinstance(config, Mapping):
        raise Int4Error(f"quantization_config: must be a table of settings, got {type(config).__name__}")
    for name in available():
        if get(name).recognises(config):
            return get(name)
    method = config.get("quant_method")
    raise Int4Error(f"quantization_config.quant_method: {method!r} is not read; known are: {', '.join(available())}")


def holds(module: nn.Module) -> bool:
    """Whether a live module was loaded by another backend in one of the formats."""
    return any(get(known).holds(module) for known in available())


def convert_module(module: nn.Module, *, name: str) -> Int4Weight | None:
    """The weight of a live module that another backend has loaded in one of the formats; else None."""
    for known in available():
        weight = get(known).convert_module(module, name=name)
        if weight is not None:
            return weight
    return None


def dense_module(module: nn.Module, *, name: str) -> Tensor | None:
    """The float weight [N, K] of a live module of another backend whose codes no kernel of ours has; else None."""
    for known in available():
        weight = get(known).dense_module(module, name=name)
        if weight is not None:
            return weight
    return None
