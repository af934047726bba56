"""MPT: ALiBi, one linear for all queries, keys and values, LayerNorm, and no biases. Clipped projections stay stock."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

LAYER = BlockLayout(
    ("18da49bd84d99ea8", "62110dcf0aa32014", None),
    input_norm="norm_1",
    attention="attn",
    post_norm="norm_2",
    mlp="ffn",
    gate=None,
    activation="act",
    own_activation=("GELU", "gelu"),
    returns_weights=True,
    norm="layer",
    eps="eps",
)

FAMILY = Family(
    attention=AttentionLayout(
        (
            "602120ff67da9de0",  # up to transformers 5.23
            "55cd51c82cb25282",
        ),
        when=(("clip_qkv", None),),
        projections="Wqkv",
        concatenated=True,
        output="out_proj",
        scale="softmax_scale",
        rotates=False,
        bias="position_bias",
        hides=True,
        heads="n_heads",
        implementation=None,
    ),
    blocks=(
        LAYER,
        dataclasses.replace(LAYER, forwards=("6f3bcc9c88ca58b5", *LAYER.forwards[1:])),  # up to transformers 5.23
    ),
    folds=(
        ScaleFold("norm_1", ("attn.Wqkv",)),
        ScaleFold("norm_2", ("ffn.up_proj",)),
    ),
)
