"""Recipes: how the codes of a weight are found. One stage per file; the file's name is the recipe's name.

A rounding stage is a module with
`quantize(weight, config, *, bits=4, name="weight") -> Int4Weight`, where `weight` is `[N, K]` in any float
dtype.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ..errors import Int4Error


def available() -> tuple[str, ...]:
    """The names of all recipes, in alphabetical order."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> ModuleType:
    """The recipe of that name.

    Raises:
        Int4Error: there is none; the message lists those that exist.
    """
    if name not in available():
        raise Int4Error(f"unknown recipe {name!r}; there are: {', '.join(available())}")
    return importlib.import_module(f"{__name__}.{name}")
