"""Mixtral: attention as in Llama, and experts."""

import dataclasses

from torch_int4.layouts.gguf import PAIRS, GgufLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama

LAYER = BlockLayout(("c882118b7a41c950", None, llama.FORWARDS[2]))

FAMILY = dataclasses.replace(llama.FAMILY, attention=llama.WINDOWED, blocks=(LAYER,))

GGUF = GgufLayout(
    "llama",
    needs=("expert_count",),
    fields={"expert_count": "num_local_experts"},
    rows={"attn_q": PAIRS, "attn_k": PAIRS},
)
