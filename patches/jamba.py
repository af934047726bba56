"""Jamba: its layers with attention as in Llama, without a rotation. The others are of Mamba and stay stock."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama

LAYER = BlockLayout(
    ("625576dc08382551", *llama.FORWARDS[1:]),
    post_norm="pre_ff_layernorm",
    mlp="feed_forward",
)

FAMILY = dataclasses.replace(
    llama.FAMILY,
    attention=AttentionLayout(
        (
            "4e59b11a5fef2801",  # up to transformers 5.23
            "ee45d219fb021f9f",
        ),
        rotates=False,
    ),
    blocks=(LAYER, dataclasses.replace(LAYER, forwards=(LAYER.forwards[0], None, LAYER.forwards[2]))),
    folds=(),
)
