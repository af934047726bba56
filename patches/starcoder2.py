"""StarCoder2: attention as in Llama, LayerNorm, and an MLP without a gate."""

import dataclasses

from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold
from torch_int4.patches import llama

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"),),
    attention=dataclasses.replace(
        llama.ATTENTION,
        forwards=(
            "8deedc18f90dba66",  # up to transformers 5.23
            "672e36c1eb80f88b",
        ),
    ),
    blocks=(
        BlockLayout(
            (llama.FORWARDS[0], "3e74aa42d49ea6d1", None),
            gate=None,
            up="c_fc",
            down="c_proj",
            activation="act",
            norm="layer",
            eps="eps",
        ),
    ),
    folds=(
        ScaleFold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScaleFold("post_attention_layernorm", ("mlp.c_fc",)),
        ScaleFold("self_attn.v_proj", ("self_attn.o_proj",), head_dim="self_attn.head_dim"),
    ),
)
