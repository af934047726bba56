"""Llama, Llama-2, Llama-3, and models that say they are of type "llama", such as SmolLM2."""

from ..attention_layout import AttentionLayout
from .families import Family

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    attention=AttentionLayout(),
)
