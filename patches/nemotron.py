"""Nemotron: attention as in Llama. The layers stay stock: their LayerNorm adds one to its weight."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.scales import ScaleFold

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"),),
    attention=AttentionLayout(
        (
            "4aef6c9e2bfff3df",  # up to transformers 5.23
            "85ccf154d0ba41ed",
        ),
    ),
    folds=(ScaleFold("self_attn.v_proj", ("self_attn.o_proj",), head_dim="self_attn.head_dim"),),
)
