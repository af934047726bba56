"""Granite 3 with experts and an MLP for all tokens beside them: as Granite."""

import dataclasses

from torch_int4.patches import granite, granitemoe

LAYER = dataclasses.replace(granitemoe.LAYER, forwards=("f0c79b7158ee5b8a", *granitemoe.LAYER.forwards[1:]))

FAMILY = dataclasses.replace(
    granite.FAMILY,
    blocks=(dataclasses.replace(LAYER, beside_mlp="shared_mlp"), LAYER),
)
