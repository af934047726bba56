"""LFM2: its layers with attention as in Qwen3, whose MLP is called. Those of convolutions stay stock."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
    attention=AttentionLayout(
        (
            "cf94fbc0bc8f8aab",  # up to transformers 5.23
            "f283bdd4bbee7d3d",
        ),
        output="out_proj",
        norms=("q_layernorm", "k_layernorm"),
    ),
    blocks=(
        BlockLayout(
            ("176342b99166e66d", None, llama.FORWARDS[2]),
            when=(("is_attention_layer", True),),
            input_norm="operator_norm",
            post_norm="ffn_norm",
            mlp="feed_forward",
        ),
    ),
)
