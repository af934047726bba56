"""Code World Model: as Llama, with sliding windows in the masks of some layers."""

from torch_int4.patches.llama import FAMILY as FAMILY
