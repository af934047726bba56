"""Bamba: its layers with attention as in Llama. The others are of Mamba and stay stock."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama

LAYER = BlockLayout(
    ("b3ee4624584b7ce2", *llama.FORWARDS[1:]),
    when=(("block_type", "full_attention"),),
    post_norm="pre_ff_layernorm",
    mlp="feed_forward",
    returns_weights=True,
)
OLDER = dataclasses.replace(  # up to transformers 5.23
    LAYER, forwards=("6ca4fd2d092491b1", *llama.FORWARDS[1:])
)

FAMILY = dataclasses.replace(
    llama.FAMILY,
    attention=AttentionLayout(
        (
            "efd14ff15fb008c2",  # up to transformers 5.23
            "f95e53bd9a961545",
        ),
    ),
    blocks=(LAYER, OLDER),
    folds=(),
)
