"""Gemma 2: as Gemma, with norms after attention and MLP, capped scores, and sliding windows in the masks of some
layers."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches.gemma import FAMILY as GEMMA
from torch_int4.patches.llama import FOLDS

LAYER = BlockLayout(
    ("0e014cb2e56b6072", *GEMMA.blocks[0].forwards[1:]),
    attention_norm="post_attention_layernorm",
    post_norm="pre_feedforward_layernorm",
    mlp_norm="post_feedforward_layernorm",
    eps="eps",
    norm_offset=1.0,
)

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    attention=AttentionLayout(
        (
            "14ef24280d03b7dc",  # up to transformers 5.23
            "9b35d907d3ddd6e3",
        ),
        softcap="attn_logit_softcapping",
        implementation="eager",  # others know no caps
    ),
    blocks=(LAYER,),
    folds=FOLDS,
)
