"""Qwen2-MoE: as Qwen2, with experts in all layers or in some."""

import dataclasses

from torch_int4.layouts.gguf import GgufLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama

SPARSE = BlockLayout((llama.FORWARDS[0], None, llama.FORWARDS[2]))
BLOCKS = (*llama.FAMILY.blocks, SPARSE)

FAMILY = dataclasses.replace(llama.FAMILY, blocks=BLOCKS)

GGUF = GgufLayout("qwen2moe")
