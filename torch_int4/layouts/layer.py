"""The facts about a family's decoder layers that fused layers need: data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch_int4.layouts.roles import Role, norm_role


@dataclass(frozen=True)
class BlockLayout:
    """Where the decoder layers of a family keep things: x += attention(norm(x)); x += mlp(norm(x)).

    There may be norms of what attention and the MLP give, too, and a factor that it is multiplied by, before the sums.

    Attributes:
        forwards: fingerprints of the `forward` of the decoder layer, of the MLP and of the norms that this is
            true of (see support/forwards.py). That of the MLP is None where it is called as the module that it is, such
            as one of experts, and that of the norms where they are `torch.nn.LayerNorm`. Modules that compute anything
            else are left alone.
        when: (attribute of the decoder layer, such as "config.parallel_attn", value) of those that this is true of.
        absent: names of arguments of `forward`, such as the states of an encoder, that are None where this is true.
        input_norm: name of the norm before attention; None where attention gets x.
        attention: name of the attention module, whose family has an `AttentionLayout`.
        attention_norm: name of the norm of what attention gives, if there is one.
        post_norm: name of the norm before the MLP; None where the MLP's norm is that before attention, or it has none
            as attention has none.
        mlp: name of the MLP, which computes down(activation(gate(x)) * up(x)); where it is called, whatever it does. ""
            where the layer itself holds the linears and the activation.
        beside_mlp: name of a second one of the same input, whose output is added, beside an MLP that is called.
        mlp_norm: name of the norm of what the MLP gives, if there is one.
        gate: name of the linear whose output goes through the activation; `up` and `down` name the others. None
            where the MLP computes down(activation(up(x))).
        up: None where the linear `gate` gives both, one half after the other.
        activation: name of the attribute of the MLP that holds the activation.
        own_activation: (name of its class, what the operators call it) of an activation that is not one of
            transformers' own; it is compared with theirs before it is used.
        calls_activation: whether the activation is called as the module that it is, of whatever kind, between `up` and
            `down`; there is no `gate` then.
        parallel: whether the MLP gets the x that attention gets, instead of the sum.
        returns_weights: whether the stock layer returns (x, attention weights) and not x alone.
        residual_scale: name of the attribute of the layer with the factor of what attention and the MLP give, if
            there is one.
        norm: kind of all norms: "rms"; "rms_once", which rounds after the product with the weight and not before it,
            too; "layer".
        eps: name of the attribute of a norm that is added to the variance.
        norm_offset: what is added to the weight of a norm.
    """

    forwards: tuple[str, str | None, str | None]
    when: tuple[tuple[str, Any], ...] = ()
    absent: tuple[str, ...] = ()
    input_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    attention_norm: str | None = None
    post_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    beside_mlp: str | None = None
    mlp_norm: str | None = None
    gate: str | None = "gate_proj"
    up: str | None = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    own_activation: tuple[str, str] | None = None
    calls_activation: bool = False
    parallel: bool = False
    returns_weights: bool = False
    residual_scale: str | None = None
    norm: str = "rms"
    eps: str = "variance_epsilon"
    norm_offset: float = 0.0

    def __post_init__(self) -> None:
        """Computes what the fields imply now: code that is compiled cannot do that when it first asks."""
        for name, entry in vars(type(self)).items():
            if isinstance(entry, cached_property):
                getattr(self, name)

    @cached_property
    def calls_mlp(self) -> bool:
        """Whether the MLP is called, so that operators run all of the layer but this."""
        return self.forwards[1] is None

    def mlp_of(self, layer: Any) -> Any:
        """The module that holds the MLP's linears, None where there is no such."""
        return layer._modules.get(self.mlp) if self.mlp else layer

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms, of which there is at least one: those before attention and the MLP, then the others."""
        return tuple(filter(None, (self.input_norm, self.post_norm, self.attention_norm, self.mlp_norm)))

    @cached_property
    def is_plain(self) -> bool:
        """Whether norms and factors are only where operators of whole layers have them, and gate and up are two linears
        that these run."""
        others = (self.attention_norm, self.mlp_norm, self.residual_scale)
        called = self.calls_mlp or self.calls_activation
        return self.input_norm is not None and others == (None,) * 3 and self.up is not None and not called

    @cached_property
    def norm_role(self) -> Role:
        """The facts that decide the results of the norms."""
        return norm_role(self.eps)

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Names of the linears of the MLP that operators run: gate, up and down, as far as there are such."""
        return () if self.calls_mlp else tuple(filter(None, (self.gate, self.up, self.down)))


@dataclass(frozen=True)
class KnownBlock:
    """A layout, and facts about the class of layers that it was found true of.

    Attributes:
        layout: where they keep things.
        mlp: class of their MLP.
        norm: class of their norms.
        positional: names of the arguments of `forward` after the first one, in their order.
        cache: name of the argument of `forward` that holds the KV cache, where that of attention has another name.
    """

    layout: BlockLayout
    mlp: Any
    norm: Any
    positional: tuple[str, ...] = ()
    cache: str | None = None
