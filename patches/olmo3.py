"""OLMo 3: as OLMo 2, with sliding windows in the masks of some layers."""

import dataclasses

from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import olmo2

ATTENTION = dataclasses.replace(
    olmo2.ATTENTION,
    forwards=(
        "502e1c515f644cab",  # up to transformers 5.23
        "c1f76db06d638899",
    ),
)

FAMILY = dataclasses.replace(olmo2.FAMILY, attention=ATTENTION)

GGUF = GgufLayout("olmo2", needs=("attention.sliding_window",))
