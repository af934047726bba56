"""Gemma 2: as Llama, with capped scores and sliding windows in the masks of some layers."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.patches.llama import FOLDS

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    attention=AttentionLayout(
        (
            "14ef24280d03b7dc",  # up to transformers 5.23
            "9b35d907d3ddd6e3",
        ),
        softcap="attn_logit_softcapping",
        implementation="eager",  # others know no caps
    ),
    folds=FOLDS,
)
