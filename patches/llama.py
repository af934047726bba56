"""Llama, Llama-2, Llama-3, and models that say they are of type "llama", such as SmolLM2."""

from ..attention_layout import AttentionLayout
from ..block_layout import BlockLayout
from .families import Family

FORWARDS = ("1a8125909341e389", "7d2027d4464e3e71", "9635bcd843f309a0")  # decoder layer, MLP, RMSNorm

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    attention=AttentionLayout(),
    blocks=(BlockLayout(FORWARDS),),
)
