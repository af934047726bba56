"""StableLM: as Llama, with LayerNorm and a rotation of some features; there may be a norm for each head."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold
from torch_int4.patches import cohere, llama

SERIAL = BlockLayout(
    ("194773e7a6e7d320", llama.FORWARDS[1], None),
    when=(("use_parallel_residual", False),),
    norm="layer",
    eps="eps",
)
ATTENTION = AttentionLayout(
    (
        "bc2515b6cf60bad1",  # up to transformers 5.23
        "1886a49edb338b65",
    ),
)
PARALLEL = dataclasses.replace(SERIAL, when=(("use_parallel_residual", True),), post_norm=None, parallel=True)

FAMILY = Family(
    shared_inputs=llama.FAMILY.shared_inputs,
    attention=(
        ATTENTION,
        dataclasses.replace(ATTENTION, norms=("q_layernorm", "k_layernorm"), norms_heads_first=True),
    ),
    blocks=(SERIAL, PARALLEL),
    folds=(
        ScaleFold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ScaleFold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScaleFold("input_layernorm", cohere.INPUTS),  # where attention and MLP get the same
        *cohere.FAMILY.folds[1:],
    ),
)
