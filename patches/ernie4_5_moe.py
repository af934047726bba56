"""ERNIE 4.5 with experts in some layers."""

import dataclasses

from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import ernie4_5, qwen2_moe

FAMILY = dataclasses.replace(ernie4_5.FAMILY, blocks=qwen2_moe.BLOCKS)

GGUF = GgufLayout(
    "ernie4_5-moe",
    fields={
        "expert_count": "moe_num_experts",
        "expert_used_count": "moe_k",
        "expert_shared_count": "moe_num_shared_experts",
        "leading_dense_block_count": "moe_layer_start_index",
        "interleave_moe_layer_step": "moe_layer_interval",
    },
    names={"mlp.gate.moe_statics.e_score_correction": "exp_probs_b"},
)
