"""What fused decoder layers need to know about a family's decoder layers: data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch_int4.layouts.roles import Role, norm_role


@dataclass(frozen=True)
class BlockLayout:
    """Where the decoder layers of a family keep things: x += attention(norm(x)); x += mlp(norm(x)).

    Attributes:
        forwards: fingerprints of the `forward` of the decoder layer, of the MLP and of the norms that this is
            true of (see support/forwards.py), that of the norms None where they are `torch.nn.LayerNorm`. Modules that
            compute anything else are left alone.
        when: (attribute of the decoder layer, such as "config.parallel_attn", value) of those that this is true of.
        input_norm: name of the norm before attention.
        attention: name of the attention module, whose family has an `AttentionLayout`.
        post_norm: name of the norm before the MLP; None where the MLP gets what attention gets.
        mlp: name of the MLP, which computes down(activation(gate(x)) * up(x)).
        gate: name of the linear whose output goes through the activation; `up` and `down` name the others. None
            where the MLP computes down(activation(up(x))).
        activation: name of the attribute of the MLP that holds the activation.
        parallel: whether the MLP gets the x that attention gets, instead of the sum.
        returns_weights: whether the stock layer returns (x, attention weights) and not x alone.
        norm: kind of both norms, "rms" or "layer".
        eps: name of the attribute of a norm that is added to the variance.
        norm_offset: what is added to the weight of a norm.
    """

    forwards: tuple[str, str, str | None]
    when: tuple[tuple[str, Any], ...] = ()
    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    post_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    parallel: bool = False
    returns_weights: bool = False
    norm: str = "rms"
    eps: str = "variance_epsilon"
    norm_offset: float = 0.0

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms."""
        return (self.input_norm,) if self.post_norm is None else (self.input_norm, self.post_norm)

    @cached_property
    def norm_role(self) -> Role:
        """What decides the results of the norms."""
        return norm_role(self.eps)

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Names of the linears of the MLP: gate, up, down, or up and down."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)


@dataclass(frozen=True)
class KnownBlock:
    """A layout, and the classes of the modules that it was found true of."""

    layout: BlockLayout
    mlp: Any
    norm: Any
