"""Other people's quantization, one file each: whoever is installed is measured next to us.

A file has ``LABEL``, ``missing() -> str | None`` (the package to install, None if it is there) and
``build(model_dir) -> model``: the model as a user of that package would load it, for CPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def known() -> dict[str, ModuleType]:
    """Every file of this folder by name."""
    return {found.name: importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)}
