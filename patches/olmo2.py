"""OLMo 2: norms come after attention and MLP, and others on all heads of query and of key together."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.gguf import GgufLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold
from torch_int4.patches import llama

ATTENTION = AttentionLayout(
    (
        "3beffa6221e451b7",  # up to transformers 5.23
        "1231781f35ef9745",
    ),
    norms=("q_norm", "k_norm"),
    norms_all_heads=True,
)

FAMILY = Family(
    shared_inputs=llama.FAMILY.shared_inputs,
    attention=ATTENTION,
    blocks=(
        BlockLayout(
            ("5e8f576265f5e632", llama.FORWARDS[1], "9311026d404757ef"),
            input_norm=None,
            attention_norm="post_attention_layernorm",
            post_norm=None,
            mlp_norm="post_feedforward_layernorm",
            norm="rms_once",
        ),
    ),
    folds=(
        ScaleFold("self_attn.v_proj", ("self_attn.o_proj",), head_dim="self_attn.head_dim"),
        ScaleFold("mlp.up_proj", ("mlp.down_proj",)),
    ),
)

GGUF = GgufLayout("olmo2", lacks=("attention.sliding_window",))
