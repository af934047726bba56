"""DeepSeek V3: linears with one input are one call. Its latent attention reaches our operator as other models' does."""

from torch_int4.layouts.family import Family

FAMILY = Family(
    shared_inputs=(
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("q_proj", "kv_a_proj_with_mqa"),  # where queries are not compressed
        ("gate_proj", "up_proj"),
    ),
)
