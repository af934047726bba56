"""Helium: as Llama, with a rotation of pairs of neighbours, and norms that round once."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama

FAMILY = dataclasses.replace(
    llama.FAMILY,
    attention=AttentionLayout(
        (
            "d2fa6f7c43420b3c",  # up to transformers 5.23
            "e57a4cb049e0e7f4",
        ),
        interleaved=True,
    ),
    blocks=(BlockLayout((*llama.FORWARDS[:2], "4a324876c902c256"), norm="rms_once"),),
)
