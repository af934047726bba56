"""Qwen3-VL, its language model: as Qwen3. Features of pictures are added between its first layers."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama

ATTENTION = AttentionLayout(
    (
        "51e451a42a68ece7",  # up to transformers 5.23
        "8285c26f8007ecd9",
    ),
    norms=("q_norm", "k_norm"),
)
LAYER = BlockLayout(("a2f006d5474ed3a6", *llama.FORWARDS[1:]))

FAMILY = dataclasses.replace(llama.FAMILY, attention=ATTENTION, blocks=(LAYER,))
