"""GLM-4-0414: as GLM, with norms after attention and MLP, too."""

import dataclasses

from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import glm

LAYER = dataclasses.replace(
    glm.LAYER,
    forwards=("9801add9d4ea0033", *glm.LAYER.forwards[1:]),
    attention_norm="post_self_attn_layernorm",
    mlp_norm="post_mlp_layernorm",
)

FAMILY = dataclasses.replace(glm.FAMILY, blocks=(LAYER,))

GGUF = GgufLayout("glm4")
