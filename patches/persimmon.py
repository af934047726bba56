"""Persimmon: as GPT-NeoX, with norms of heads, and an activation that operators do not have."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

ATTENTION = AttentionLayout(
    (
        "2b2f0ee689f96ead",  # up to transformers 5.23
        "fbd1d196c60f751f",
    ),
    projections="query_key_value",
    output="dense",
)
LAYER = BlockLayout(
    ("ed7736f4aafec779", "4374b3e41214b943", None),
    gate=None,
    up="dense_h_to_4h",
    down="dense_4h_to_h",
    activation="act",
    norm="layer",
    eps="eps",
)

FAMILY = Family(
    attention=(ATTENTION, dataclasses.replace(ATTENTION, norms=("q_layernorm", "k_layernorm"))),
    blocks=(LAYER, dataclasses.replace(LAYER, calls_activation=True)),
    folds=(
        ScaleFold("input_layernorm", ("self_attn.query_key_value",)),
        ScaleFold("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ),
)
