"""Qwen3: as Llama, with a norm on each head of query and key."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import llama

ATTENTION = AttentionLayout(
    (
        "6171c666977f70ef",  # up to transformers 5.23
        "65d7a4bb66b173a7",
    ),
    norms=("q_norm", "k_norm"),
)

FAMILY = dataclasses.replace(llama.FAMILY, attention=ATTENTION)

GGUF = GgufLayout("qwen3")
