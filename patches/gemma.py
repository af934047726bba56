"""Gemma: linears and attention as in Llama, norms that multiply by 1 + weight."""

import dataclasses

from torch_int4.layouts.gguf import GgufLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama

FAMILY = dataclasses.replace(
    llama.FAMILY,
    blocks=(BlockLayout((*llama.FORWARDS[:2], "db1d195519129c91"), eps="eps", norm_offset=1.0),),
)

GGUF = GgufLayout("gemma", norms_hold_one=True)
