"""OLMo 1: attention as in Llama, unless projections are clipped. The layers stay stock: their norms have no weight."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.patches import llama

FAMILY = dataclasses.replace(
    llama.FAMILY,
    attention=AttentionLayout(
        (
            "d217c7bfc399f1f3",  # up to transformers 5.23
            "54b9e79554ff6cd3",
        ),
        when=(("config.clip_qkv", None),),
    ),
    blocks=(),
    folds=llama.FOLDS[3:],
)
