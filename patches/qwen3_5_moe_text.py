"""Qwen3.5 with experts, its language model: as Qwen3-Next."""

from torch_int4.patches.qwen3_next import FAMILY as FAMILY
