"""Qwen3-MoE: as Qwen3, with experts in all layers or in some."""

import dataclasses

from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import qwen2_moe, qwen3

FAMILY = dataclasses.replace(qwen3.FAMILY, blocks=qwen2_moe.BLOCKS)

GGUF = GgufLayout("qwen3moe", settings={"norm_topk_prob": True})
