"""Fused decoder layers: one operator call in the place of a layer, with our KV cache; with other caches, or none, five.

The five are norm and projections; rotation; attention; output projection and sum; norm, MLP and sum. What the
operators do not serve (gradients, training, hooks on the modules inside, adapters, weights left in float) runs as the
stock layer would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.cache.int4_cache import Int4Cache
from torch_int4.layouts.layer import BlockLayout, KnownBlock
from torch_int4.nn.layer_parts import Parts, agree, find_parts
from torch_int4.nn.prepared import Guard, PreparedLayer, layers, watch
from torch_int4.nn.stack import running
from torch_int4.ops.calls import call
from torch_int4.support.mixins import Mixin


class FusedBlock(Mixin):
    """Mixed into decoder layers of families that have a `BlockLayout`."""

    torch_int4_data: KnownBlock

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`[batch, tokens, features]` to the same."""
        # Not where a graph is made of it: inductor would compute masks and angles again for the next layer, from a
        # length that this one has advanced.
        compiling = torch.compiler.is_compiling()
        turn = None if compiling or args else running.turn
        output = None if turn is None else turn.run(self, hidden_states, kwargs)
        if output is None and not (compiling or args):
            output = _run_prepared(self, hidden_states, kwargs)
        if output is None:
            parts = None if args else find_parts(self, hidden_states, kwargs)
            if parts is None:
                if not compiling:
                    layers.pop(self, None)  # it may hold weights that nothing else does
                return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
            whole = not compiling and isinstance(kwargs.get(parts.attention.torch_int4_data.cache), Int4Cache)
            whole = whole and parts.head_norms is not None and agree(parts.linears)
            if whole:
                output = _run_whole(self, parts, hidden_states, kwargs)
            else:
                output = _run_steps(parts, hidden_states, kwargs)
        return (output, None) if self.torch_int4_data.layout.returns_weights else output

    def extra_repr(self) -> str:
        """What `print(model)` adds."""
        return "fused by torch_int4"


def _packed(linears: list[Any]) -> tuple[list[Any], ...]:
    """Weights, scales, offsets and biases."""
    buffers = [m._buffers for m in linears]
    names = ("packed", "packed_scales", "packed_offsets")
    return (*([b[name] for b in buffers] for name in names), [m._parameters["bias"] for m in linears])


def _options(linears: list[Any]) -> dict[str, Any]:
    first = linears[0]
    return {
        "out_features": [m.out_features for m in linears],
        "group_size": first.group_size,
        "weight_type": first.weight_type,
        "compute": first.compute,
    }


def _norm_options(layout: BlockLayout, norm: Any) -> dict[str, Any]:
    return {"norm": layout.norm, "eps": getattr(norm, layout.eps), "norm_offset": layout.norm_offset}


def _run_prepared(block: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The output of a layer that was prepared, if nothing has changed and the cache is ours."""
    layer = layers.get(block)
    if layer is None or not isinstance(kwargs.get(layer.cache), Int4Cache) or not layer.serves(block, x, kwargs):
        return None
    return layer.run(x, kwargs)


def _run_whole(block: Any, parts: Parts, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The output of a layer with our cache. Where no gradients are recorded it is prepared for the next time."""
    if not torch.is_grad_enabled() and type(x) is Tensor:
        layers[block] = layer = _prepare(block, parts, x)
        return layer.run(x, kwargs)
    attention = parts.attention
    cache = kwargs[attention.torch_int4_data.cache].layer(attention.layer_idx)
    cache.reserve(x, *attention.kv_sizes())
    cos, sin, rotary = attention.rotation(kwargs)
    output: Tensor = call(
        torch.ops.torch_int4.decoder_layer.default,
        x,
        **_arguments(parts),
        cos=cos,
        sin=sin,
        key_cache=cache.keys,
        value_cache=cache.values,
        key_scales=cache.key_scales,
        value_scales=cache.value_scales,
        length=cache.length,
        mask=kwargs.get("attention_mask"),
        **rotary,
        **attention.scoring(),
    )
    cache.advance(x.shape[1])
    return output


def _arguments(parts: Parts) -> dict[str, Any]:
    """What operators of whole layers are told of one, besides its input, positions and cache."""
    layout, norms, linears = parts.layout, parts.norms, parts.linears
    weights, scales, offsets, biases = _packed(linears)
    return {
        "norm_weights": [norm._parameters["weight"] for norm in norms],
        "norm_biases": [norm._parameters.get("bias") for norm in norms],
        "head_norms": [norm._parameters["weight"] for norm in parts.head_norms or ()],
        "weights": weights,
        "scales": scales,
        "offsets": offsets,
        "biases": biases,
        "perms": [m._buffers["perm"] for m in linears],
        "activation": parts.activation,
        "projections": len(parts.attention.torch_int4_data.layout.linears),
        "parallel_residual": layout.parallel,
        **_options(linears),
        **_norm_options(layout, norms[0]),
    }


def _prepare(block: Any, parts: Parts, x: Tensor) -> PreparedLayer:
    layout, attention, linears = parts.layout, parts.attention, parts.linears
    inner, mlp = attention.torch_int4_data.layout, block._modules[layout.mlp]
    norms = [*parts.norms, *(parts.head_norms or ())]
    watched = watch(block._modules, layout.attention, layout.mlp, *layout.norms)
    watched += watch(attention._modules, *inner.children)
    watched += watch(mlp._modules, layout.activation, *layout.linears)
    for linear in linears:
        watched += watch(linear._buffers, "packed", "perm") + watch(linear._parameters, "bias")
        watched += watch(vars(linear), "compute")
    for norm in norms:
        watched += watch(norm._parameters, "weight", "bias") + watch(vars(norm), layout.eps)
    modules = (attention, mlp, mlp._modules[layout.activation], *norms, *linears)
    guard = Guard(x.dtype, watched, modules, [norm._parameters["weight"] for norm in norms])
    return PreparedLayer(attention, mlp, guard, {**_arguments(parts), "interleaved": inner.interleaved})


def _run_steps(parts: Parts, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    layout, attention, norms, _, linears, _ = parts
    count = len(attention.torch_int4_data.layout.linears)
    projected = _norm_linears(layout, x, norms[0], linears[:count])
    attended = attention.attend_heads(*attention.split_heads(projected), kwargs)
    total = _linear_add(attended, x, linears[count])
    return _mlp(parts, x if layout.parallel else total, total, linears[count + 1 :])


def _norm_linears(layout: BlockLayout, x: Tensor, norm: Any, linears: list[Any]) -> list[Tensor]:
    outputs: list[Tensor] = call(
        torch.ops.torch_int4.norm_linears.default,
        x,
        norm._parameters["weight"],
        norm._parameters.get("bias"),
        *_packed(linears),
        linears[0]._buffers["perm"],
        **_options(linears),
        **_norm_options(layout, norm),
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
        **{**_options([linear]), "out_features": linear.out_features},
    )
    return y


def _mlp(parts: Parts, x: Tensor, residual: Tensor, linears: list[Any]) -> Tensor:
    norm = parts.norms[-1]
    y: Tensor = call(
        torch.ops.torch_int4.mlp.default,
        x,
        residual,
        norm._parameters["weight"],
        norm._parameters.get("bias"),
        *_packed(linears),
        linears[0]._buffers["perm"],
        linears[-1]._buffers["perm"],
        activation=parts.activation,
        **_options(linears),
        **_norm_options(parts.layout, norm),
    )
    return y
