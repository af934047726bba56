"""Mistral: as Llama, with a sliding window in its masks."""

from torch_int4.patches.llama import FAMILY as FAMILY
