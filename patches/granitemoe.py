"""Granite 3 with experts: as Granite."""

import dataclasses

from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import granite, llama

LAYER = BlockLayout(
    ("eda05f6c5ec2cbdd", None, llama.FORWARDS[2]),
    mlp="block_sparse_moe",
    residual_scale="residual_multiplier",
)

FAMILY = dataclasses.replace(granite.FAMILY, blocks=(LAYER,))

GGUF = dataclasses.replace(
    granite.GGUF,
    architecture="granitemoe",
    fields={**granite.GGUF.fields, "expert_count": "num_local_experts"},
    names={"block_sparse_moe.router": "ffn_gate_inp"},
)
