"""Phi-3.5-MoE: as Mixtral, with LayerNorm."""

import dataclasses

from torch_int4.layouts.layer import BlockLayout
from torch_int4.patches import llama, mixtral

LAYER = BlockLayout((mixtral.LAYER.forwards[0], None, None), norm="layer", eps="eps")

FAMILY = dataclasses.replace(llama.FAMILY, blocks=(LAYER,))
