"""Makes lm-eval know ``model="torch_int4"`` as soon as both packages are imported, in whichever order.

lm-eval has no entry points, and its registry of models fills when ``lm_eval.models`` is imported. Importing that here
would cost seconds and need lm-eval; an entry made before would be taken for a registry that is full. So our line is
added after that module has run. It is a path; our class, and with it lm-eval's own model classes, is imported by the
first evaluation that asks for it.
"""

from __future__ import annotations

import sys
from types import ModuleType

from torch_int4.support.after_import import after_import

NAME = "torch_int4"
TARGET = "torch_int4.evals.accuracy.harness:Int4LM"
_MODULE = "lm_eval.models"
_REGISTRY = "lm_eval.api.registry"


def install() -> None:
    """Registers at once if lm-eval's models are imported, and waits for them if not. Calling it again is harmless."""
    after_import(_MODULE, register)


def register(module: ModuleType | None = None) -> None:
    """Adds the entry. Versions of lm-eval without lazy entries (before 0.4.10) keep working, without our model."""
    registry = getattr(sys.modules.get(_REGISTRY), "model_registry", None)
    if registry is not None and NAME not in registry:
        registry.register(NAME, target=TARGET)
