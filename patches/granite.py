"""Granite: as Llama, with a scale of its own."""

from .llama import FAMILY as FAMILY
