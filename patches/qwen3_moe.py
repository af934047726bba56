"""Qwen3-MoE: attention as in Qwen3."""

from .qwen3 import FAMILY as FAMILY
