"""Phi-3 and Phi-4: as Llama, with one linear for query, key and value, and one for gate and up."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold
from torch_int4.patches import llama

MLP = "8f93c3ff1e3a6dd8"  # its forward; models of other families have it, too

FAMILY = Family(
    attention=AttentionLayout(
        (
            "b353b275cd51de82",  # up to transformers 5.23
            "a9a6dc0b1f366cc8",
        ),
        projections="qkv_proj",
        concatenated=True,
    ),
    blocks=(
        BlockLayout(
            ("45de6abac2bb4bd2", MLP, llama.FORWARDS[2]),
            gate="gate_up_proj",
            up=None,
            activation="activation_fn",
        ),
    ),
    folds=(
        ScaleFold("input_layernorm", ("self_attn.qkv_proj",)),
        ScaleFold("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
)
