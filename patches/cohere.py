"""Command R: attention and MLP of a layer get the same input; norms of heads have weights for each of them."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.gguf import GgufLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold
from torch_int4.patches import llama

INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ATTENTION = AttentionLayout(
    (
        "8d3b54dcbc486b9b",  # up to transformers 5.23
        "d19b3f3c27917967",
    ),
    interleaved=True,
    repeated=True,
)

FAMILY = Family(
    shared_inputs=(INPUTS,),
    attention=(ATTENTION, dataclasses.replace(ATTENTION, norms=("q_norm", "k_norm"))),
    blocks=(
        BlockLayout(
            ("41f8ecff3f23f0af", llama.FORWARDS[1], "3bda1898d50852e7"),
            post_norm=None,
            parallel=True,
            norm="layer",
        ),
    ),
    folds=(
        ScaleFold("input_layernorm", INPUTS),
        ScaleFold("self_attn.v_proj", ("self_attn.o_proj",), head_dim="self_attn.head_dim"),
        ScaleFold("mlp.up_proj", ("mlp.down_proj",)),
    ),
)

GGUF = GgufLayout("command-r", fields={"logit_scale": "logit_scale"})
