"""Granite 4: layers with attention as in Granite, with or without experts and a rotation; those of Mamba stay stock."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import granite, llama

ROTATED = AttentionLayout(
    (
        "2ee6509cce475c65",  # up to transformers 5.23
        "fdc1e8b4ed66de8f",
    ),
    when=(("config.position_embedding_type", "rope"),),
)
OTHERS = tuple(
    dataclasses.replace(ROTATED, when=(("config.position_embedding_type", each),), rotates=False)
    for each in (None, "nope")
)
DENSE = BlockLayout(
    ("a6b75598c2f80156", "80119a32412cf5ef", llama.FORWARDS[2]),
    when=(("mamba", None), ("has_experts", False)),
    mlp="shared_mlp",
    gate="input_linear",
    up=None,
    down="output_linear",
    activation="activation",
    residual_scale="residual_multiplier",
)
SPARSE = BlockLayout(
    ("a6b75598c2f80156", None, llama.FORWARDS[2]),
    when=(("mamba", None), ("has_experts", True)),
    mlp="block_sparse_moe",
    beside_mlp="shared_mlp",
    residual_scale="residual_multiplier",
)
OLDER = tuple(  # up to transformers 5.23
    dataclasses.replace(each, forwards=("b99d6c6f6d2b25a4", *each.forwards[1:])) for each in (DENSE, SPARSE)
)

FAMILY = dataclasses.replace(
    granite.FAMILY,
    attention=(ROTATED, *OTHERS),
    blocks=(DENSE, SPARSE, *OLDER),
    folds=(),
)
