"""DeepSeek V2: as DeepSeek V3."""

from torch_int4.patches.deepseek_v3 import FAMILY as FAMILY
