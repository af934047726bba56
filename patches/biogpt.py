"""BioGPT: as OPT."""

import dataclasses

from torch_int4.patches import opt

ATTENTION = dataclasses.replace(
    opt.FAMILY.attentions[0],
    forwards=(
        "9483931b1e405dfd",  # up to transformers 5.23
        "e47e84fc13c8e1cd",
    ),
)
LAYERS = tuple(
    dataclasses.replace(layer, forwards=("6d0a42ec7934fa65", "6d0a42ec7934fa65", None), when=())
    for layer in opt.FAMILY.blocks
)

FAMILY = dataclasses.replace(opt.FAMILY, attention=ATTENTION, blocks=LAYERS)
