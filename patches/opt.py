"""OPT: as GPT-2 with three linears, and an MLP whose parts the layer holds. Norms after the sums (350M) stay stock."""

import dataclasses

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

LAYER = BlockLayout(
    ("d46f411703911134", "d46f411703911134", None),
    when=(("do_layer_norm_before", True),),
    input_norm="self_attn_layer_norm",
    post_norm="final_layer_norm",
    mlp="",
    gate=None,
    up="fc1",
    down="fc2",
    activation="activation_fn",
    norm="layer",
    eps="eps",
)
CALLED = dataclasses.replace(LAYER, calls_activation=True)  # which is ReLU, that operators do not have

FAMILY = Family(
    shared_inputs=(("q_proj", "k_proj", "v_proj"),),
    attention=AttentionLayout(
        (
            "75fc7499d9451995",  # up to transformers 5.23
            "d44312816889c690",
        ),
        output="out_proj",
        rotates=False,
    ),
    blocks=(LAYER, CALLED),
    folds=(
        ScaleFold("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScaleFold("final_layer_norm", ("fc1",)),
        ScaleFold("self_attn.v_proj", ("self_attn.out_proj",), head_dim="self_attn.head_dim"),
    ),
)
