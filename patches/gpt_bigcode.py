"""GPT-BigCode (SantaCoder, StarCoder 1): as GPT-2, with one key head, or a linear whose rows go head by head."""

import dataclasses

from torch_int4.patches import gpt2

ONE_KEY = dataclasses.replace(
    gpt2.ATTENTION,
    forwards=(
        "f8eef023375e4058",  # up to transformers 5.23
        "f47ad47adad5c194",
    ),
    when=(("multi_query", True), ("is_cross_attention", False)),
)

FAMILY = dataclasses.replace(
    gpt2.FAMILY,
    attention=(
        ONE_KEY,
        dataclasses.replace(ONE_KEY, when=(("multi_query", False), *ONE_KEY.when[1:]), concatenated=False),
    ),
    blocks=(dataclasses.replace(gpt2.LAYER, forwards=("bfe4f1e3e06c201d", *gpt2.LAYER.forwards[1:])),),
)
