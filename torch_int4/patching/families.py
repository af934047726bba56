"""The families of models that have a file in patches/, and which of them a module belongs to."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from torch import nn

from torch_int4 import patches
from torch_int4.errors import Int4Error
from torch_int4.layouts.family import Family


def available() -> tuple[str, ...]:
    """Names of the families that have a file, the generic one included."""
    names = (module.name for module in pkgutil.iter_modules(patches.__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


@functools.cache
def find(model_type: str | None) -> Family:
    """The family of a Hugging Face `model_type`, or the generic one where there is no file for it."""
    name = (model_type or "generic").replace("-", "_")
    return _load(name if name in available() else "generic")


def resolve(family: Family | str | None) -> Family | None:
    """The family that the user gave as `family`.

    Raises:
        Int4Error: a name without a file, or another type.
    """
    if family is None or isinstance(family, Family):
        return family
    if not isinstance(family, str) or family not in available():
        raise Int4Error(f"unknown family {family!r}; there are: {', '.join(available())}. Or pass a Family")
    return _load(family)


def source_of(family: Family) -> str:
    """Where a family comes from, in words."""
    names = (name for name in available() if _load(name) is family)
    return next((f"patches/{name}.py" for name in names), "the given Family")


def of_modules(model: nn.Module, given: Family | None) -> dict[int, Family]:
    """The family of each module of a model, by `id`: that of the nearest module above it whose config says
    so.

    So the Llama inside a model of pictures and text is treated as a Llama.
    """
    result: dict[int, Family] = {}

    def visit(module: nn.Module, inherited: Family) -> None:
        model_type = _model_type(module)
        family = find(model_type) if given is None and model_type is not None else inherited
        if id(module) not in result:
            result[id(module)] = family
            for child in module.children():
                visit(child, family)

    visit(model, given or find(None))
    return result


def _model_type(module: nn.Module) -> str | None:
    config: Any = getattr(module, "config", None)
    model_type = getattr(config, "model_type", None)
    return model_type if isinstance(model_type, str) and model_type else None


def extra(name: str, attribute: str) -> Any:
    """What a family's file says under another name than `FAMILY`, for the rooms that ask for it; None if nothing."""
    return getattr(importlib.import_module(f"{patches.__name__}.{name}"), attribute, None)


def _load(name: str) -> Family:
    family = extra(name, "FAMILY")
    if not isinstance(family, Family):
        raise Int4Error(f"patches/{name}.py: FAMILY must be a Family, got {type(family).__name__}")
    return family
