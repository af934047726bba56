"""Qwen2: as Llama, with biases."""

from .llama import FAMILY as FAMILY
