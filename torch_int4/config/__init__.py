"""Settings by which a model is quantized and run: `Int4Config` = `WeightOptions` + `RunOptions`."""

from torch_int4.config.int4_config import Int4Config
from torch_int4.config.run_options import (
    ATTENTIONS,
    COMPUTE,
    EMBEDDINGS,
    HEADS,
    KV_CACHES,
    OF_RUNNING,
    RunOptions,
)
from torch_int4.config.weight_options import (
    GROUP_SIZES,
    PRESETS,
    ZEROS,
    WeightOptions,
    checks_recipes,
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
    "RunOptions",
    "WeightOptions",
    "checks_recipes",
    "is_group_size",
]
