"""Qwen2-MoE: attention as in Qwen2."""

from .llama import FAMILY as FAMILY
