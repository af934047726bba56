"""INT4 inference of Hugging Face models on CPUs: `torch_int4.patch(model)`."""

from importlib import metadata as _metadata

from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.info import info
from torch_int4.linear import Int4Linear
from torch_int4.patches import patch
from torch_int4.weight import Int4Weight

__version__ = _metadata.version("torch-int4")
__all__ = ["Int4Config", "Int4Error", "Int4Linear", "Int4Weight", "__version__", "info", "patch"]
