"""GPT-J: attention and MLP of a block get the same input; the rotation interleaves pairs of the first features."""

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.family import Family
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold

FAMILY = Family(
    shared_inputs=(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),),
    attention=AttentionLayout(
        output="out_proj",
        cache="layer_past",
        scale=None,
        positions="embed_positions",
        implementation="eager",  # the only one that it has on CPUs
        interleaved=True,
    ),
    blocks=(
        BlockLayout(
            ("8f8ac6b002fbc2b4", "6cf9e8ca14fd94ed", None),
            input_norm="ln_1",
            attention="attn",
            post_norm=None,
            gate=None,
            up="fc_in",
            down="fc_out",
            activation="act",
            parallel=True,
            returns_weights=True,
            norm="layer",
            eps="eps",
        ),
    ),
    folds=(
        ScaleFold("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),
        ScaleFold("attn.v_proj", ("attn.out_proj",)),
    ),
)
