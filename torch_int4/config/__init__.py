"""How a model is quantized and run: `Int4Config`."""

from torch_int4.config.int4_config import (
    ATTENTIONS,
    COMPUTE,
    EMBEDDINGS,
    GROUP_SIZES,
    HEADS,
    KV_CACHES,
    OF_RUNNING,
    PRESETS,
    ZEROS,
    Int4Config,
    is_group_size,
)

__all__ = [
    "ATTENTIONS",
    "COMPUTE",
    "EMBEDDINGS",
    "GROUP_SIZES",
    "HEADS",
    "KV_CACHES",
    "OF_RUNNING",
    "PRESETS",
    "ZEROS",
    "Int4Config",
    "is_group_size",
]
