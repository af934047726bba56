"""GPT-NeoX and Pythia: one linear for query, key and value of each head, a rotation of some features only."""

from ..attention_layout import AttentionLayout
from .families import Family

FAMILY = Family(
    attention=AttentionLayout(
        projections="query_key_value",
        output="dense",
        cache="layer_past",
        head_dim="head_size",
    ),
)
