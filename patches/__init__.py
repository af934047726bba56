"""Patching Hugging Face models in place: `patch`, the facts about each model family, and the walk over a
model.

One file per family, named by its `model_type`; `generic` serves every other model.
"""

from ._report import PatchReport
from .families import Family
from .patcher import patch

__all__ = ["Family", "PatchReport", "patch"]
