"""Gemma 2: as Llama, with capped scores and sliding windows in the masks of some layers."""

from ..attention_layout import AttentionLayout
from .families import Family
from .llama import FOLDS

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    attention=AttentionLayout(softcap="attn_logit_softcapping", implementation="eager"),  # others know no caps
    folds=FOLDS,
)
