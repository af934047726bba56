"""Qwen2-MoE: attention as in Qwen2."""

import dataclasses

from torch_int4.patches import llama

FAMILY = dataclasses.replace(llama.FAMILY, blocks=())
