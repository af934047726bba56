"""Qwen2-MoE: attention as in Qwen2."""

import dataclasses

from . import llama

FAMILY = dataclasses.replace(llama.FAMILY, blocks=())
