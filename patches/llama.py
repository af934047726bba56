"""Llama, Llama-2, Llama-3, and models that say they are of type "llama", such as SmolLM2."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.gguf import PAIRS, GgufLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

FORWARDS = ("0bbec4849760d2d6", "8146bac7a8b1d3d6", "2c349a2bd03b0671")  # decoder layer, MLP, RMSNorm
ATTENTION = AttentionLayout(
    (
        "39c5e704d19e218e",  # up to transformers 5.23
        "3633abc0c652474a",
    )
)
WINDOWED = dataclasses.replace(  # which tells transformers the window that its masks have
    ATTENTION,
    forwards=(
        "64535214c8470958",  # up to transformers 5.23; of layers of several types
        "fdfc40d57db3c07e",
        "44a18608a635d298",  # up to transformers 5.23; of layers of one type
        "515a20fb4f601499",
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

GGUF = GgufLayout("llama", lacks=("expert_count",), rows={"attn_q": PAIRS, "attn_k": PAIRS})
