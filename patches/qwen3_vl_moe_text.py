"""Qwen3-VL-MoE, its language model: as Qwen3-VL, with experts in all layers or in some."""

import dataclasses

from torch_int4.patches import qwen2_moe, qwen3_vl_text

FAMILY = dataclasses.replace(qwen3_vl_text.FAMILY, blocks=qwen2_moe.BLOCKS)
