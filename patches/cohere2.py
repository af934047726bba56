"""Command R7B and Command A: as Command R, without a rotation in the layers that have no window."""

import dataclasses

from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import cohere

OTHER = dataclasses.replace(
    cohere.ATTENTION,
    forwards=(
        "fd4d4f6b1b34f7e8",  # up to transformers 5.23
        "4285b48b0cd3e226",
    ),
    when=(("sliding_window", None),),
    rotates=False,
)
ROTATED = dataclasses.replace(OTHER, when=(), rotates=True)
LAYER = cohere.FAMILY.blocks[0]

FAMILY = dataclasses.replace(
    cohere.FAMILY,
    attention=(OTHER, ROTATED),
    blocks=(dataclasses.replace(LAYER, forwards=("1bdc37170ef75741", *LAYER.forwards[1:])),),
)

GGUF = GgufLayout("cohere2", fields={"logit_scale": "logit_scale"})
