"""Qwen3-MoE: attention as in Qwen3."""

import dataclasses

from torch_int4.patches import qwen3

FAMILY = dataclasses.replace(qwen3.FAMILY, blocks=())
