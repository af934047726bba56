"""Phi-3.5-MoE: attention as in Llama."""

from .llama import FAMILY as FAMILY
