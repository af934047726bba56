"""Makes lm-eval know ``model="torch_int4"`` as soon as both packages are imported, in whichever order.

lm-eval has no entry points, and its registry of models fills when ``lm_eval.models`` is imported. Importing that here
would cost seconds and need lm-eval; an entry made before would be taken for a registry that is full. So a finder
on ``sys.meta_path`` waits for this one module, adds our line after it has run, and goes away. What is added is a
path; our class, and with it lm-eval's own model classes, is imported by the first evaluation that asks for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

NAME = "torch_int4"
TARGET = "torch_int4.evals.harness:Int4LM"
_MODULE = "lm_eval.models"
_REGISTRY = "lm_eval.api.registry"


def install() -> None:
    """Registers at once if lm-eval's models are imported, and waits for them if not. Calling it again is harmless."""
    if isinstance(sys.modules.get(_MODULE), types.ModuleType):
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Adds the entry. Versions of lm-eval without lazy entries (before 0.4.10) keep working, without our model."""
    registry = getattr(sys.modules.get(_REGISTRY), "model_registry", None)
    if registry is not None and NAME not in registry:
        registry.register(NAME, target=TARGET)


class _Finder:
    """Finds `lm_eval.models` as everybody else does, with a loader that registers afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None)
        spec = next(found, None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, and our entry after it."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        register()
