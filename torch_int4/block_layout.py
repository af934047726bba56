"""What fused decoder layers need to know about a family's decoder layers: data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockLayout:
    """Where the decoder layers of a family keep things: x += attention(norm(x)); x += mlp(norm(x)).

    Attributes:
        input_norm: name of the norm before attention.
        attention: name of the attention module, whose family has an `AttentionLayout` with three projections.
        post_norm: name of the norm before the MLP.
        mlp: name of the MLP, which computes down(activation(gate(x)) * up(x)).
        gate: name of the linear whose output goes through the activation; `up` and `down` name the others.
        activation: name of the attribute of the MLP that holds the activation.
        norm: kind of both norms, "rms" or "layer".
        eps: name of the attribute of a norm that is added to the variance.
        norm_offset: what is added to the weight of a norm.
        forwards: fingerprints of the `forward` of the decoder layer, of the MLP and of the norms that this is
            true of (see patches/_block.py). Modules that compute anything else are left alone.
    """

    forwards: tuple[str, str, str]
    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    post_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    norm: str = "rms"
    eps: str = "variance_epsilon"
    norm_offset: float = 0.0


@dataclass(frozen=True)
class KnownBlock:
    """A layout, and the classes of the modules that it was found true of."""

    layout: BlockLayout
    mlp: type
    norm: type
