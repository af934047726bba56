"""SmolLM3: as Llama, without a rotation in some layers."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.gguf import PAIRS, GgufLayout
from torch_int4.patches import llama

ROTATED = AttentionLayout(
    (
        "2346e09a44f7f1fa",  # up to transformers 5.23
        "4bff15cc1d69a2e1",
    ),
    when=(("use_rope", True),),
)
OTHER = dataclasses.replace(ROTATED, when=(("use_rope", False),), rotates=False)

FAMILY = dataclasses.replace(llama.FAMILY, attention=(ROTATED, OTHER))

GGUF = GgufLayout("smollm3", rows={"attn_q": PAIRS, "attn_k": PAIRS})
