"""Qwen3: as Llama, with a norm on each head of query and key."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.patches import llama

FAMILY = dataclasses.replace(llama.FAMILY, attention=AttentionLayout(norms=("q_norm", "k_norm")))
