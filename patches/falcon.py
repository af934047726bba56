"""Falcon: multi-query (7B), grouped with two norms (40B), and RW with ALiBi, which its masks contain."""

from ..attention_layout import AttentionLayout
from ..folding import ScaleFold
from .families import Family

FAMILY = Family(
    shared_inputs=(("self_attention.query_key_value", "mlp.dense_h_to_4h"),),
    not_shared_beside=("post_attention_layernorm", "ln_mlp"),
    attention=AttentionLayout(
        projections="query_key_value",
        output="dense",
        cache="layer_past",
        scale=None,
        unrotated="alibi",
        repeats_kv="new_decoder_architecture",
    ),
    folds=(
        ScaleFold("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        ScaleFold("input_layernorm", ("self_attention.query_key_value",)),
        ScaleFold("ln_attn", ("self_attention.query_key_value",)),
        ScaleFold("ln_mlp", ("mlp.dense_h_to_4h",)),
        ScaleFold("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ScaleFold(
            "self_attention.query_key_value",
            ("self_attention.dense",),
            head_dim="self_attention.head_dim",
            fused=True,
        ),
    ),
)
