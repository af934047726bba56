"""Fused decoder layers: five operator calls in the place of a layer of Llama's structure.

norm and q, k, v; rotation into the cache; attention; output projection and sum; norm, MLP and sum. What they do not
serve (gradients, training, hooks on the modules inside, adapters, weights left in float) runs as the stock layer would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from torch_int4.attention import FLOATS, FusedAttention
from torch_int4.block_layout import KnownBlock
from torch_int4.calls import call
from torch_int4.linear import Int4Linear
from torch_int4.subclass import Mixin

# Classes of activations by what the operators call them.
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


class FusedBlock(Mixin):
    """Mixed into decoder layers of families that have a `BlockLayout`."""

    torch_int4_data: KnownBlock

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`[batch, tokens, features]` to the same."""
        if args or not _is_served(self, hidden_states, kwargs):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        x, layout, modules = hidden_states, self.torch_int4_data.layout, self._modules  # type: ignore[attr-defined]
        attention, mlp = modules[layout.attention], modules[layout.mlp]._modules
        inner, heads = (
            attention.torch_int4_data,
            (*x.shape[:-1], -1, getattr(attention, attention.torch_int4_data.head_dim)),
        )
        query, key, value = _norm_linears(
            layout, x, modules[layout.input_norm], _children(attention, inner.projections)
        )
        x = _linear_add(
            attention.attend_heads(query.view(heads), key.view(heads), value.view(heads), kwargs),
            x,
            attention._modules[inner.output],
        )
        linears = [mlp[layout.gate], mlp[layout.up], mlp[layout.down]]
        activation = ACTIVATIONS[type(mlp[layout.activation]).__name__]
        return _gated_mlp(layout, x, modules[layout.post_norm], linears, activation)

    def extra_repr(self) -> str:
        """What `print(model)` adds."""
        return "fused by torch_int4"


def _norm_linears(layout: Any, x: Tensor, norm: Any, linears: Sequence[Any]) -> list[Tensor]:
    outputs: list[Tensor] = call(
        torch.ops.torch_int4.norm_linears.default,
        x,
        norm._parameters["weight"],
        norm._parameters.get("bias"),
        [m._buffers["packed"] for m in linears],
        [m._buffers["packed_scales"] for m in linears],
        [m._buffers["packed_offsets"] for m in linears],
        [m._parameters["bias"] for m in linears],
        linears[0]._buffers["perm"],
        out_features=[m.out_features for m in linears],
        group_size=linears[0].group_size,
        weight_type=linears[0].weight_type,
        compute=linears[0].compute,
        norm=layout.norm,
        eps=getattr(norm, layout.eps),
        norm_offset=layout.norm_offset,
    )
    return outputs


def _linear_add(x: Tensor, residual: Tensor, linear: Any) -> Tensor:
    buffers = linear._buffers
    y: Tensor = call(
        torch.ops.torch_int4.linear_add.default,
        x,
        residual,
        buffers["packed"],
        buffers["packed_scales"],
        buffers["packed_offsets"],
        linear._parameters["bias"],
        buffers["perm"],
        out_features=linear.out_features,
        group_size=linear.group_size,
        weight_type=linear.weight_type,
        compute=linear.compute,
    )
    return y


def _gated_mlp(layout: Any, x: Tensor, norm: Any, linears: Sequence[Any], activation: str) -> Tensor:
    y: Tensor = call(
        torch.ops.torch_int4.gated_mlp.default,
        x,
        x,
        norm._parameters["weight"],
        norm._parameters.get("bias"),
        [m._buffers["packed"] for m in linears],
        [m._buffers["packed_scales"] for m in linears],
        [m._buffers["packed_offsets"] for m in linears],
        [m._parameters["bias"] for m in linears],
        linears[0]._buffers["perm"],
        linears[2]._buffers["perm"],
        out_features=[m.out_features for m in linears],
        group_size=linears[0].group_size,
        weight_type=linears[0].weight_type,
        compute=linears[0].compute,
        activation=activation,
        norm=layout.norm,
        eps=getattr(norm, layout.eps),
        norm_offset=layout.norm_offset,
    )
    return y


def _children(module: Any, names: Sequence[str]) -> list[Any]:
    return [module._modules.get(name) for name in names]


def _is_served(block: Any, x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the operators give what the stock layer would. Everything in it may have changed since it was patched."""
    known: KnownBlock = block.torch_int4_data
    layout, modules = known.layout, block._modules
    attention, mlp = modules.get(layout.attention), modules.get(layout.mlp)
    if not isinstance(attention, FusedAttention) or type(mlp) is not known.mlp or x.dtype not in FLOATS:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
        return False
    if _is_hooked(attention) or _is_hooked(mlp) or _has_any_global_hook() or mlp.training:
        return False
    for name in (layout.input_norm, layout.post_norm):
        norm = modules.get(name)
        if type(norm) is not known.norm or _is_hooked(norm) or norm._parameters["weight"].dtype != x.dtype:
            return False
    activation = mlp._modules.get(layout.activation)
    if type(activation).__name__ not in ACTIVATIONS or _is_hooked(activation):
        return False
    shared = _children(attention, attention.torch_int4_data.projections)
    gate, up, down, output = (
        *_children(mlp, (layout.gate, layout.up, layout.down)),
        attention._modules[attention.torch_int4_data.output],
    )
    if not all(type(m) is Int4Linear and not _is_hooked(m) for m in (*shared, gate, up, down, output)):
        return False
    return (
        all(_agree(shared[0], other) and _same_perm(shared[0], other) for other in shared[1:])
        and _agree(gate, up)
        and _same_perm(gate, up)
        and _agree(gate, down)
        and attention.serves(x, kwargs)
    )


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _agree(a: Int4Linear, b: Int4Linear) -> bool:
    return a.group_size == b.group_size and a.compute == b.compute and a.weight_type == b.weight_type


def _same_perm(a: Int4Linear, b: Int4Linear) -> bool:
    """Linears were compared when they were merged."""
    return a._buffers["perm"] is b._buffers["perm"] or (a._shared is not None and a._shared is b._shared)
