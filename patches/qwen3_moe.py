"""Qwen3-MoE: attention as in Qwen3."""

import dataclasses

from . import qwen3

FAMILY = dataclasses.replace(qwen3.FAMILY, blocks=())
