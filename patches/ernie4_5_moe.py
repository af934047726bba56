"""ERNIE 4.5 with experts in some layers."""

import dataclasses

from torch_int4.patches import ernie4_5, qwen2_moe

FAMILY = dataclasses.replace(ernie4_5.FAMILY, blocks=qwen2_moe.BLOCKS)
