"""Llama, Llama-2, Llama-3, and models that say they are of type "llama", such as SmolLM2."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

FORWARDS = ("223a3cfccaa8e6a5", "7d2027d4464e3e71", "9635bcd843f309a0")  # decoder layer, MLP, RMSNorm
ATTENTION = AttentionLayout(
    (
        "95afba5870b8e68f",  # up to transformers 5.23
        "566f3dcc0092edc0",
    )
)
WINDOWED = dataclasses.replace(  # which tells transformers the window that its masks have
    ATTENTION,
    forwards=(
        "58be77feb2cb2a0f",  # up to transformers 5.23; of layers of several types
        "b2b46533a8f04834",
        "5bb2b2130304bb6f",  # up to transformers 5.23; of layers of one type
        "ed1dd2a1e0ff51bd",
    ),
)

FOLDS = (
    ScaleFold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ScaleFold("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),  # where the next one comes after o_proj
    ScaleFold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ScaleFold("self_attn.v_proj", ("self_attn.o_proj",), head_dim="self_attn.head_dim"),
    ScaleFold("mlp.up_proj", ("mlp.down_proj",)),
)

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    attention=ATTENTION,
    blocks=(BlockLayout(FORWARDS),),
    folds=FOLDS,
)
