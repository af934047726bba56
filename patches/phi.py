"""Phi-1 and Phi-2: attention and MLP of a layer get the same input; a rotation of some features."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.gguf import GgufLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
ATTENTION = AttentionLayout(
    (
        "35be7a700d750b84",  # up to transformers 5.23
        "c2b6e56687fdd966",
    ),
    output="dense",
)

FAMILY = Family(
    shared_inputs=(INPUTS,),
    attention=(ATTENTION, dataclasses.replace(ATTENTION, norms=("q_layernorm", "k_layernorm"))),
    blocks=(
        BlockLayout(
            ("9134348220843eff", "1941731c3b23c5a0", None),
            post_norm=None,
            gate=None,
            up="fc1",
            down="fc2",
            activation="activation_fn",
            parallel=True,
            norm="layer",
            eps="eps",
        ),
    ),
    folds=(
        ScaleFold("input_layernorm", INPUTS),
        ScaleFold("self_attn.v_proj", ("self_attn.dense",), head_dim="self_attn.head_dim"),
    ),
)

GGUF = GgufLayout("phi2")
