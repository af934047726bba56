"""GPT-J: attention and MLP of a block get the same input; the rotation interleaves pairs of the first features."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

ATTENTION = AttentionLayout(("57d804f979ffa739",), output="out_proj", interleaved=True, sines_first=True)
OLD_ATTENTION = dataclasses.replace(  # up to transformers 5.23
    ATTENTION,
    forwards=("e7b128492004c6db",),
    scale=None,
    positions="embed_positions",
    implementation="eager",  # the only one that it had on CPUs
    sines_first=False,
)
LAYER = BlockLayout(
    ("8d2a0312d31f062a", "6cf9e8ca14fd94ed", None),
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

OLD_LAYER = dataclasses.replace(LAYER, forwards=("1be29f480f990d63", *LAYER.forwards[1:]), returns_weights=True)

FAMILY = Family(
    shared_inputs=(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),),
    attention=(ATTENTION, OLD_ATTENTION),
    blocks=(LAYER, OLD_LAYER),
    folds=(
        ScaleFold("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),
        ScaleFold("attn.v_proj", ("attn.out_proj",)),
    ),
)
