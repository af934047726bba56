"""GPT-NeoX and Pythia: one linear for query, key and value of each head, a rotation of some features only."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.gguf import HEADS, GgufLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

SERIAL = BlockLayout(
    ("31091cc0c25496a4", "4374b3e41214b943", None),
    when=(("use_parallel_residual", False),),
    attention="attention",
    gate=None,
    up="dense_h_to_4h",
    down="dense_4h_to_h",
    activation="act",
    norm="layer",
    eps="eps",
)

FAMILY = Family(
    attention=AttentionLayout(
        ("40c6a89992915ee1",),
        projections="query_key_value",
        output="dense",
        head_dim="head_size",
    ),
    blocks=(SERIAL, dataclasses.replace(SERIAL, when=(("use_parallel_residual", True),), parallel=True)),
    folds=(
        ScaleFold("input_layernorm", ("attention.query_key_value",)),
        ScaleFold("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ScaleFold("attention.query_key_value", ("attention.dense",), head_dim="attention.head_size", fused=True),
    ),
)

GGUF = GgufLayout("gptneox", fields={"use_parallel_residual": "use_parallel_residual"}, rows={"attn_qkv": HEADS})
