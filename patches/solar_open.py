"""Solar Open: as Llama, with experts."""

from torch_int4.patches.qwen2_moe import FAMILY as FAMILY
