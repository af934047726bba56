"""Qwen3: as Llama, with a norm on each head of query and key."""

import dataclasses

from ..attention_layout import AttentionLayout
from . import llama

FAMILY = dataclasses.replace(llama.FAMILY, attention=AttentionLayout(norms=("q_norm", "k_norm")))
