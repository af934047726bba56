"""GPT-NeoX and Pythia: one linear for query, key and value of each head, a rotation of some features only."""

from ..attention_layout import AttentionLayout
from ..folding import ScaleFold
from .families import Family

FAMILY = Family(
    attention=AttentionLayout(
        projections="query_key_value",
        output="dense",
        cache="layer_past",
        head_dim="head_size",
    ),
    folds=(
        ScaleFold("input_layernorm", ("attention.query_key_value",)),
        ScaleFold("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ScaleFold("attention.query_key_value", ("attention.dense",), head_dim="attention.head_size", fused=True),
    ),
)
