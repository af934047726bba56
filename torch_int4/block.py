"""Fused decoder layers: one operator call in the place of a layer, with our KV cache; with other caches, or none, five.

The five are norm and projections; rotation; attention; output projection and sum; norm, MLP and sum. What the
operators do not serve (gradients, training, hooks on the modules inside, adapters, weights left in float) runs as the
stock layer would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from torch_int4.attention import FLOATS, FusedAttention
from torch_int4.block_layout import BlockLayout, KnownBlock
from torch_int4.cache import Int4Cache
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


class Parts(NamedTuple):
    """The modules of a layer that the operators can run."""

    layout: BlockLayout
    attention: Any
    norms: list[Any]
    head_norms: list[Any] | None  # None where they have to be called
    linears: list[Any]  # projections, output, gate, up, down
    activation: str


class FusedBlock(Mixin):
    """Mixed into decoder layers of families that have a `BlockLayout`."""

    torch_int4_data: KnownBlock

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`[batch, tokens, features]` to the same."""
        parts = None if args else find_parts(self, hidden_states, kwargs)
        if parts is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        inner = parts.attention.torch_int4_data
        cache = kwargs.get(inner.cache)
        # Not where a graph is made of it: inductor would compute masks and angles again for the next layer, from a
        # length that this one has advanced.
        whole = isinstance(cache, Int4Cache) and not torch.compiler.is_compiling()
        whole = whole and parts.head_norms is not None and _agree(parts.linears)
        output = (_run_whole if whole else _run_steps)(parts, hidden_states, kwargs)
        return (output, None) if parts.layout.returns_weights else output

    def extra_repr(self) -> str:
        """What `print(model)` adds."""
        return "fused by torch_int4"


def find_parts(block: Any, x: Tensor, kwargs: dict[str, Any]) -> Parts | None:
    """The modules of a layer, if the operators give what it would for x and these arguments of `forward`.

    Everything in it may have changed since it was patched, and this runs for every layer and token: plain loops, no
    generators.
    """
    known: KnownBlock = block.torch_int4_data
    layout, modules = known.layout, block._modules
    attention: Any = modules.get(layout.attention)
    mlp: Any = modules.get(layout.mlp)
    if not _is_fused(attention) or type(mlp) is not known.mlp or x.dtype not in FLOATS:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
        return None
    inner, inside = attention.torch_int4_data, mlp._modules
    norms = [modules.get(name) for name in layout.norms]
    activation = inside.get(layout.activation)
    kind = ACTIVATIONS.get(type(activation).__name__)
    linears = [attention._modules.get(name) for name in inner.children[: len(inner.linears) + 1]]
    linears += [inside.get(name) for name in layout.linears]
    if kind is None or not _are_norms(norms, known, norms[0], x) or not _are_plain(linears, Int4Linear):
        return None
    if _has_any_global_hook() or block.training or mlp.training or _are_hooked((attention, mlp, activation)):
        return None
    if not _are_shared(linears, len(inner.linears), layout) or not attention.serves(x, kwargs):
        return None
    head_norms: list[Any] | None = [attention._modules.get(name) for name in inner.norms or ()]
    if head_norms and not _are_norms(head_norms, known, norms[0], x):
        head_norms = None
    return Parts(layout, attention, norms, head_norms, linears, kind)


def _is_fused(attention: Any) -> bool:
    return isinstance(attention, FusedAttention)


def _are_hooked(modules: Sequence[Any]) -> bool:
    """Whether calling one of these does more than its class says."""
    for module in modules:
        fields = module.__dict__
        if fields["_forward_hooks"] or fields["_forward_pre_hooks"] or "forward" in fields:
            return True
    return False


def _are_plain(modules: Sequence[Any], kind: type) -> bool:
    for module in modules:
        if type(module) is not kind:
            return False
    return not _are_hooked(modules)


def _are_norms(norms: Any, known: KnownBlock, like: Any, x: Tensor) -> bool:
    """Whether these are the norms that we know, as yet, and agree with one of them."""
    if not _are_plain(norms, known.norm):
        return False
    name, dtype = known.layout.eps, x.dtype
    eps = getattr(like, name)
    for norm in norms:  # noqa: SIM110 (a generator takes twice as long)
        if norm._parameters["weight"].dtype != dtype or getattr(norm, name) != eps:
            return False
    return True


def _are_shared(linears: list[Any], projections: int, layout: BlockLayout) -> bool:
    """Whether linears with one input can take it in one form, and those of the MLP agree."""
    first, mlp = linears[0], linears[projections + 1 :]
    if not _agree(linears) and not (_agree(linears[:projections]) and _agree(mlp)):
        return False
    for other in linears[1:projections]:
        if not _same_perm(first, other):
            return False
    return layout.gate is None or _same_perm(mlp[0], mlp[1])


def _agree(linears: list[Any]) -> bool:
    first = linears[0]
    group, compute, kind = first.group_size, first.compute, first.weight_type
    for m in linears:  # noqa: SIM110
        if m.group_size != group or m.compute != compute or m.weight_type != kind:
            return False
    return True


def _same_perm(a: Any, b: Any) -> bool:
    """Linears were compared when they were merged."""
    return a._buffers["perm"] is b._buffers["perm"] or (a._shared is not None and a._shared is b._shared)


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


def _run_whole(parts: Parts, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    layout, attention, norms, head_norms, linears, activation = parts
    inner = attention.torch_int4_data
    projections, size = len(inner.linears), getattr(attention, inner.head_dim)
    layer = kwargs[inner.cache].layer(attention.layer_idx)
    layer.reserve(x, attention.kv_heads(), size)
    cos, sin, rotary = attention.rotation(kwargs)
    output: Tensor = call(
        torch.ops.torch_int4.decoder_layer.default,
        x,
        [norm._parameters["weight"] for norm in norms],
        [norm._parameters.get("bias") for norm in norms],
        [norm._parameters["weight"] for norm in head_norms or ()],
        *_packed(linears),
        [m._buffers["perm"] for m in linears],
        cos,
        sin,
        layer.keys,
        layer.values,
        layer.key_scales,
        layer.value_scales,
        layer.length,
        kwargs.get("attention_mask"),
        activation=activation,
        projections=projections,
        parallel_residual=layout.parallel,
        **_options(linears),
        **_norm_options(layout, norms[0]),
        **rotary,
        **attention.scoring(),
    )
    layer.advance(x.shape[1])
    return output


def _run_steps(parts: Parts, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    layout, attention, norms, _, linears, _ = parts
    count = len(attention.torch_int4_data.linears)
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
