"""Qwen3-Next: attention as in Qwen3 with a gate, and experts; layers of linear attention stay stock."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import gemma, llama

ATTENTION = AttentionLayout(
    (
        "5455ab77018da83c",  # up to transformers 5.23
        "502c5ac6c0f06c8e",
    ),
    gated=True,
    norms=("q_norm", "k_norm"),
)
NORM = gemma.FAMILY.blocks[0].forwards[2]
DENSE = BlockLayout(
    ("ba68ae00c684cde3", llama.FORWARDS[1], NORM),
    when=(("block_type", "full_attention"),),
    eps="eps",
    norm_offset=1.0,
)
OLDER = dataclasses.replace(DENSE, forwards=("2f26accec3b6dce5", *DENSE.forwards[1:]))  # up to transformers 5.23
SPARSE = tuple(dataclasses.replace(each, forwards=(each.forwards[0], None, NORM)) for each in (DENSE, OLDER))

FAMILY = dataclasses.replace(llama.FAMILY, attention=ATTENTION, blocks=(DENSE, OLDER, *SPARSE), folds=())
