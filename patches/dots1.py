"""dots.llm1: as Qwen3-MoE, with experts after the first layers."""

from torch_int4.patches.qwen3_moe import FAMILY as FAMILY
