"""dots.llm1: as Qwen3-MoE, with experts after the first layers."""

import dataclasses

from torch_int4.patches import glm4_moe
from torch_int4.patches.qwen3_moe import FAMILY as FAMILY

GGUF = dataclasses.replace(glm4_moe.GGUF, architecture="dots1")
