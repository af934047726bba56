"""Other libraries' products with the same weight, one file each, found by name.

A file here defines ``builders(weight, rotate)``: by name, what makes each contestant of that library which can run
here and takes the weight, holding copies of `rotate` bytes; and ``missing()``: what to install, or to set, for the
library to take part, or None if it does. It imports the library only inside functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

from torch_int4 import Int4Weight
from torch_int4.evals.bench.contestants import Contestant


def builders(weight: Int4Weight, rotate: int) -> dict[str, Callable[[], Contestant]]:
    """By name, what makes each peer that is installed and takes this weight."""
    found: dict[str, Callable[[], Contestant]] = {}
    for module in _modules():
        found |= module.builders(weight, rotate)
    return found


def missing() -> list[str]:
    """The peers that the bench could ask if it were installed."""
    return [text for module in _modules() if (text := module.missing()) is not None]


def _modules() -> Iterator[Any]:
    for found in pkgutil.iter_modules(__path__):
        yield importlib.import_module(f"{__name__}.{found.name}")
