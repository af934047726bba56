"""Mistral: as Llama, with a sliding window in its masks."""

from .llama import FAMILY as FAMILY
