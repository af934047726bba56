"""EXAONE 4.0: norms come after attention and MLP, as in OLMo 2, and there is one on each head of query and key; layers
that attend to everything have no rotation where others have a window."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import llama, olmo2

ROTATED = AttentionLayout(
    (
        "4d1f68a0543d1e9f",  # up to transformers 5.23
        "5bb3cd39cb83550a",
    ),
    when=(("sliding_window", None),),
    norms=("q_norm", "k_norm"),
)
LAYER = dataclasses.replace(
    olmo2.FAMILY.blocks[0],
    forwards=(olmo2.FAMILY.blocks[0].forwards[0], *llama.FORWARDS[1:]),
    norm="rms",
)

FAMILY = dataclasses.replace(
    olmo2.FAMILY,
    attention=(
        ROTATED,
        dataclasses.replace(ROTATED, when=(("is_sliding", True),)),
        dataclasses.replace(ROTATED, when=(("is_sliding", False),), rotates=False),  # beside layers with a window
    ),
    blocks=(LAYER,),
)

GGUF = GgufLayout("exaone4")
