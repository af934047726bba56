"""INT4 inference of Hugging Face models on CPUs: `torch_int4.patch(model)`."""

from importlib import metadata as _metadata
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from torch_int4 import recipes as _recipes  # noqa: F401 (registers how the recipe of an Int4Config is checked)
from torch_int4.calibration.data import Calibration
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.hf import from_pretrained
from torch_int4.hf import harness_hook as _harness_hook
from torch_int4.nn.linear import Int4Linear
from torch_int4.ops.info import info
from torch_int4.patching.patcher import patch
from torch_int4.tuning.autotune import autotune
from torch_int4.weights.canonical import Int4Weight

if _TYPE_CHECKING:
    from torch_int4.cache.int4_cache import Int4Cache

_harness_hook.install()

__version__ = _metadata.version("torch-int4")
__all__ = [
    "Calibration",
    "Int4Cache",
    "Int4Config",
    "Int4Error",
    "Int4Linear",
    "Int4Weight",
    "__version__",
    "autotune",
    "from_pretrained",
    "info",
    "patch",
]


def __getattr__(name: str) -> _Any:
    """Int4Cache comes with transformers, which takes seconds to import."""
    if name == "Int4Cache":
        from torch_int4.cache.int4_cache import Int4Cache

        return Int4Cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
