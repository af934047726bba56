"""Gemma 3, its language model: as Gemma 2, with a norm on each head of query and key, and no caps."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.patches import gemma2

ATTENTION = AttentionLayout(
    (
        "ed4b6445e4e04c3a",  # up to transformers 5.23
        "c92d3b5042b00f7f",
    ),
    norms=("q_norm", "k_norm"),
)

FAMILY = dataclasses.replace(gemma2.FAMILY, attention=ATTENTION)
