"""LFM2 with experts: as LFM2."""

from torch_int4.patches.lfm2 import FAMILY as FAMILY
