"""Facts about model families: one file per `model_type`, each with `FAMILY`, a `Family` of data.

`generic` serves every model without a file of its own.
"""

from torch_int4.layouts.family import Family

__all__ = ["Family"]
