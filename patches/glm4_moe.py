"""GLM-4.5 to 4.7: as Llama, with a rotation of some features, norms of heads in some sizes, and experts after the first
layers."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import llama, qwen2_moe

ATTENTION = AttentionLayout(
    (
        "e38a2ce410af1aa6",  # up to transformers 5.23
        "2362f41de1185c8f",
    )
)
NORMED = dataclasses.replace(ATTENTION, norms=("q_norm", "k_norm"))

FAMILY = dataclasses.replace(llama.FAMILY, attention=(ATTENTION, NORMED), blocks=qwen2_moe.BLOCKS)

GGUF = GgufLayout(
    "glm4moe",
    fields={
        "expert_count": "n_routed_experts",
        "expert_shared_count": "n_shared_experts",
        "leading_dense_block_count": "first_k_dense_replace",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_weights_norm": "norm_topk_prob",
    },
)
