"""OLMoE: as Qwen2-MoE, with norms on all heads of query and of key together."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import llama, qwen2_moe

ATTENTION = AttentionLayout(
    (
        "7b2c25a0efecdbb1",  # up to transformers 5.23
        "100fa6ab15677466",
    ),
    when=(("config.clip_qkv", None),),
    norms=("q_norm", "k_norm"),
    norms_all_heads=True,
)

FAMILY = dataclasses.replace(llama.FAMILY, attention=ATTENTION, blocks=(qwen2_moe.SPARSE,))

GGUF = GgufLayout("olmoe")
