"""Qwen3-VL, its language model: as Qwen3."""

import dataclasses

from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama, qwen3

ATTENTION = dataclasses.replace(
    qwen3.ATTENTION,
    forwards=(
        "51e451a42a68ece7",  # up to transformers 5.23
        "8285c26f8007ecd9",
    ),
)
LAYER = BlockLayout(("a2f006d5474ed3a6", *llama.FORWARDS[1:]))

FAMILY = dataclasses.replace(llama.FAMILY, attention=ATTENTION, blocks=(LAYER,))
