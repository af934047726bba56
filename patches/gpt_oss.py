"""gpt-oss: as Qwen2-MoE, with sinks, windows in the masks of every other layer, and norms that round once."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama

ATTENTION = AttentionLayout(
    (
        "6fcc628a6782ee27",  # up to transformers 5.23
        "fe942002fb6b83ad",
    ),
    implementation="eager",
    column_per_pair=True,
    sinks="sinks",
)
LAYER = BlockLayout(("4d411e4678714860", None, "9311026d404757ef"), norm="rms_once")

FAMILY = dataclasses.replace(llama.FAMILY, attention=ATTENTION, blocks=(LAYER,))
