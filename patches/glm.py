"""GLM-4 of 2024: a rotation that interleaves pairs of some features, and one linear for gate and up."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold
from torch_int4.patches import llama, phi3

LAYER = BlockLayout(
    (llama.FORWARDS[0], phi3.MLP, llama.FORWARDS[2]),
    gate="gate_up_proj",
    up=None,
    activation="activation_fn",
)

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"),),
    attention=AttentionLayout(
        (
            "11b798cb36cd1aa8",  # up to transformers 5.23
            "4b6e74fc6b5de2e7",
        ),
        interleaved=True,
    ),
    blocks=(LAYER,),
    folds=(
        ScaleFold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScaleFold("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ScaleFold("self_attn.v_proj", ("self_attn.o_proj",), head_dim="self_attn.head_dim"),
    ),
)
