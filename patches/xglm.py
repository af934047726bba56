"""XGLM: as OPT, with attention of its own."""

import dataclasses

from torch_int4.patches import opt

ATTENTION = dataclasses.replace(
    opt.FAMILY.attentions[0],
    forwards=(
        "3948b37e1033e9ee",  # up to transformers 5.23
        "b567dff44f416462",
    ),
    implementation=None,
)
LAYERS = tuple(
    dataclasses.replace(
        layer,
        forwards=("38dcb6102f6c2b1c", "38dcb6102f6c2b1c", None),
        when=(),
        absent=("encoder_hidden_states", "encoder_attention_mask"),
    )
    for layer in opt.FAMILY.blocks
)

FAMILY = dataclasses.replace(opt.FAMILY, attention=ATTENTION, blocks=LAYERS)
