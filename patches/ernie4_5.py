"""ERNIE 4.5: as Llama, with a rotation that interleaves pairs."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import llama

ATTENTION = AttentionLayout(
    (
        "e6e5177977e203b3",  # up to transformers 5.23
        "2aff3425cac22bd5",
    ),
    interleaved=True,
)

FAMILY = dataclasses.replace(llama.FAMILY, attention=ATTENTION)

GGUF = GgufLayout("ernie4_5")
