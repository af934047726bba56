"""GPT-2: transformers' `Conv1D` as linears, one for all queries, keys and values, LayerNorm; no rotation."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

ATTENTION = AttentionLayout(
    (
        "2408ebe582ea882f",  # up to transformers 5.23
        "517ae39eddc25a3d",
    ),
    when=(("is_cross_attention", False),),
    projections="c_attn",
    concatenated=True,
    output="c_proj",
    rotates=False,
)
LAYER = BlockLayout(
    ("a1fff8c4820953c1", "515016006e478d77", None),
    absent=("encoder_hidden_states", "encoder_attention_mask"),
    input_norm="ln_1",
    attention="attn",
    post_norm="ln_2",
    gate=None,
    up="c_fc",
    down="c_proj",
    activation="act",
    norm="layer",
    eps="eps",
)

FAMILY = Family(
    attention=ATTENTION,
    blocks=(LAYER,),
    folds=(
        ScaleFold("ln_1", ("attn.c_attn",)),
        ScaleFold("ln_2", ("mlp.c_fc",)),
    ),
)
