"""BLOOM: ALiBi, one linear for query, key and value of each head, and residuals that attention and MLP add."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

ATTENTION = AttentionLayout(
    ("486665b07dfb4a4b",),
    when=(("slow_but_exact", False),),
    projections="query_key_value",
    output="dense",
    scale="inv_norm_factor",
    rotates=False,
    bias="alibi",
    residual="residual",
    heads="num_heads",
    implementation=None,
)

FAMILY = Family(
    attention=ATTENTION,
    blocks=(
        BlockLayout(
            ("db68373b56a1af97", "8ebef5cb23855af4", None),
            when=(("apply_residual_connection_post_layernorm", False), ("mlp.slow_but_exact", False)),
            attention="self_attention",
            gate=None,
            up="dense_h_to_4h",
            down="dense_4h_to_h",
            activation="gelu_impl",
            own_activation=("BloomGelu", "gelu_tanh"),
            returns_weights=True,
            norm="layer",
            eps="eps",
        ),
    ),
    folds=(
        ScaleFold("input_layernorm", ("self_attention.query_key_value",)),
        ScaleFold("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ScaleFold(
            "self_attention.query_key_value",
            ("self_attention.dense",),
            head_dim="self_attention.head_dim",
            fused=True,
        ),
    ),
)
