"""Qwen2-VL, its language model: as Qwen2."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.patches import llama

ATTENTION = AttentionLayout(
    (
        "aa504f3ae063f244",  # up to transformers 5.23
        "1d0946c960ac469b",
    )
)

FAMILY = dataclasses.replace(llama.FAMILY, attention=ATTENTION)
