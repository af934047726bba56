"""Gemma: linears and attention as in Llama."""

from .llama import FAMILY as FAMILY
