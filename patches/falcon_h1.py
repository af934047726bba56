"""Falcon-H1: its attention as in Llama, with a factor of keys. The layers, half of each of Mamba, stay stock."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"),),
    attention=AttentionLayout(
        (
            "16f50c3ab16733f0",  # up to transformers 5.23
            "648e75aab520fa3e",
        ),
        key_factor="key_multiplier",
    ),
)
