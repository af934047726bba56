"""Qwen2: as Llama, with biases."""

from torch_int4.patches.llama import FAMILY as FAMILY
