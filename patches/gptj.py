"""GPT-J: attention and MLP of a block get the same input; the rotation interleaves pairs of the first features."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

ATTENTION = AttentionLayout(("a02a29455b1dda84",), output="out_proj", interleaved=True, sines_first=True)
OLD_ATTENTION = dataclasses.replace(  # up to transformers 5.23
    ATTENTION,
    forwards=("e0d3c29567434f20",),
    scale=None,
    positions="embed_positions",
    implementation="eager",  # the only one that it had on CPUs
    sines_first=False,
)
LAYER = BlockLayout(
    ("ee6b0ffd28ca0b80", "3cbca819cd661e36", None),
    input_norm="ln_1",
    attention="attn",
    post_norm=None,
    gate=None,
    up="fc_in",
    down="fc_out",
    activation="act",
    parallel=True,
    norm="layer",
    eps="eps",
)

OLD_LAYER = dataclasses.replace(LAYER, forwards=("a626bea95be3a0d5", *LAYER.forwards[1:]), returns_weights=True)

FAMILY = Family(
    shared_inputs=(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),),
    attention=(ATTENTION, OLD_ATTENTION),
    blocks=(LAYER, OLD_LAYER),
    folds=(
        ScaleFold("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),
        ScaleFold("attn.v_proj", ("attn.out_proj",)),
    ),
)
