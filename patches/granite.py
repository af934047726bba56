"""Granite: as Llama, with a scale of its own, and factors on what is added to the residual."""

import dataclasses

from torch_int4.layouts.gguf import PAIRS, GgufLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama

LAYER = BlockLayout(("929b5ff765ac6d4f", *llama.FORWARDS[1:]), residual_scale="residual_multiplier")

FAMILY = dataclasses.replace(llama.FAMILY, blocks=(LAYER,))

GGUF = GgufLayout(
    "granite",
    fields={
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    rows={"attn_q": PAIRS, "attn_k": PAIRS},
)
