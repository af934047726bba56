"""Code World Model: as Llama, with sliding windows in the masks of some layers."""

from .llama import FAMILY as FAMILY
