"""Qwen3: as Llama, with a norm on each head of query and key."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.patches import llama

ATTENTION = AttentionLayout(
    (
        "cd3f33ede2a5e2a9",  # up to transformers 5.23
        "0f06e240b8a4a446",
    ),
    norms=("q_norm", "k_norm"),
)

FAMILY = dataclasses.replace(llama.FAMILY, attention=ATTENTION)
