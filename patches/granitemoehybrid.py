"""Granite 4: its attention as in Granite, with or without a rotation. The layers, some of Mamba, stay stock."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.patches import granite

ATTENTION = AttentionLayout(
    (
        "2ee6509cce475c65",  # up to transformers 5.23
        "fdc1e8b4ed66de8f",
    ),
    when=(("config.position_embedding_type", "rope"),),
)
UNROTATED = dataclasses.replace(ATTENTION, when=(("config.position_embedding_type", "nope"),), rotates=False)

FAMILY = dataclasses.replace(granite.FAMILY, attention=(ATTENTION, UNROTATED), blocks=(), folds=())
