"""Falcon: multi-query (7B), grouped with two norms (40B), and RW with ALiBi, which its masks contain."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

SERIAL = BlockLayout(
    ("b267238d84bd5a34", "12e07e33af0f87fe", None),
    when=(("config.new_decoder_architecture", False), ("config.parallel_attn", False)),
    attention="self_attention",
    gate=None,
    up="dense_h_to_4h",
    down="dense_4h_to_h",
    activation="act",
    returns_weights=True,
    norm="layer",
    eps="eps",
)
ONE_NORM = dataclasses.replace(
    SERIAL,
    when=(("config.new_decoder_architecture", False), ("config.parallel_attn", True)),
    post_norm=None,
    parallel=True,
)
TWO_NORMS = dataclasses.replace(
    ONE_NORM,
    when=(("config.new_decoder_architecture", True), ("config.num_ln_in_parallel_attn", 2)),
    input_norm="ln_attn",
    post_norm="ln_mlp",
)

FAMILY = Family(
    shared_inputs=(("self_attention.query_key_value", "mlp.dense_h_to_4h"),),
    not_shared_beside=("post_attention_layernorm", "ln_mlp"),
    attention=AttentionLayout(
        ("54cc3f4d8fc00587",),
        projections="query_key_value",
        output="dense",
        scale=None,
        unrotated="alibi",
        repeats_kv="new_decoder_architecture",
    ),
    blocks=(SERIAL, ONE_NORM, TWO_NORMS),
    folds=(
        ScaleFold("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        ScaleFold("input_layernorm", ("self_attention.query_key_value",)),
        ScaleFold("ln_attn", ("self_attention.query_key_value",)),
        ScaleFold("ln_mlp", ("mlp.dense_h_to_4h",)),
        ScaleFold("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ScaleFold(
            "self_attention.query_key_value",
            ("self_attention.dense",),
            head_dim="self_attention.head_dim",
            fused=True,
        ),
    ),
)
