"""Qwen2.5-VL, its language model: as Qwen2."""

from torch_int4.patches.qwen2_vl_text import FAMILY as FAMILY
