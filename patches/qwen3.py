"""Qwen3: as Llama, with a norm on each head of query and key."""

from ..attention_layout import AttentionLayout
from .families import Family
from .llama import FOLDS

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    attention=AttentionLayout(norms=("q_norm", "k_norm")),
    folds=FOLDS,
)
