"""Llama, Llama-2, Llama-3, and models that say they are of type "llama", such as SmolLM2."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

FORWARDS = ("1a8125909341e389", "7d2027d4464e3e71", "9635bcd843f309a0")  # decoder layer, MLP, RMSNorm

FOLDS = (
    ScaleFold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ScaleFold("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),  # where the next one comes after o_proj
    ScaleFold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ScaleFold("self_attn.v_proj", ("self_attn.o_proj",), head_dim="self_attn.head_dim"),
    ScaleFold("mlp.up_proj", ("mlp.down_proj",)),
)

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    attention=AttentionLayout(),
    blocks=(BlockLayout(FORWARDS),),
    folds=FOLDS,
)
