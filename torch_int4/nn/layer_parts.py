"""The decoder layers that operators can run, as they are now: modules, hooks, types and settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.layer import BlockLayout, KnownBlock
from torch_int4.layouts.roles import LINEAR
from torch_int4.nn.attend import FLOATS
from torch_int4.nn.attention import FusedAttention
from torch_int4.nn.layer_facts import LayerFacts
from torch_int4.nn.linear import Int4Linear

# Classes of activations by what the operators call them.
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


def find_facts(block: Any, x: Tensor, kwargs: dict[str, Any]) -> LayerFacts | None:
    """The modules of a layer, if the operators give what it would for x and these arguments of `forward`.

    Everything in it may have changed since it was patched. Where gradients are recorded this runs for every layer and
    token: plain loops, no generators.
    """
    known: KnownBlock = block.torch_int4_data
    layout, modules = known.layout, block._modules
    attention: Any = modules.get(layout.attention)
    mlp: Any = layout.mlp_of(block)
    if not _is_fused(attention) or (mlp is not block and type(mlp) is not known.mlp) or x.dtype not in FLOATS:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
        return None
    inner, inside = attention.torch_int4_data.layout, mlp._modules
    named: dict[str, Any] = {name: modules.get(name) for name in layout.norms}
    norms = list(named.values())
    parts, activation, kind = [attention], None, None
    if not layout.calls_mlp:
        activation = inside.get(layout.activation)
        kind = activation_kind(activation, layout)
        if (kind is None and not layout.calls_activation) or mlp.training:
            return None
        if not layout.calls_activation:
            parts.append(activation)
        if mlp is not block:
            parts.append(mlp)
    linears = [attention._modules.get(name) for name in inner.children[: len(inner.linears) + 1]]
    linears += [inside.get(name) for name in layout.linears]
    if not _are_norms(norms, known, norms[0], x) or not _are_plain(linears, Int4Linear):
        return None
    if _has_any_global_hook() or block.training or _are_hooked(parts):
        return None
    if not _are_shared(linears, len(inner.linears), layout) or not attention.serves(x, kwargs):
        return None
    head_norms: list[Any] | None = [attention._modules.get(name) for name in inner.norms or ()]
    if head_norms and not (_are_norms(head_norms, known, norms[0], x) and _are_of_heads(head_norms, inner)):
        head_norms = None
    return LayerFacts(block, attention, mlp, named, head_norms, linears, activation, kind)


def activation_kind(activation: Any, layout: BlockLayout) -> str | None:
    """What operators call an activation, None where they have none like it."""
    name, own = type(activation).__name__, layout.own_activation
    return own[1] if own is not None and name == own[0] else ACTIVATIONS.get(name)


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
    """Whether these are still the norms that we know, with parameters of the dtype of x, and agree with one of them."""
    if not _are_plain(norms, known.norm):
        return False
    dtype = x.dtype
    for norm in norms:
        if norm._parameters["weight"].dtype != dtype:
            return False
    return known.layout.norm_role.agree([like, *norms])


def _are_of_heads(norms: list[Any], layout: AttentionLayout) -> bool:
    """Whether norms have one weight and no bias for all heads, each of which they take by itself, as operators have
    it."""
    parameters = [norm._parameters for norm in norms]
    return not layout.norms_all_heads and all(p["weight"].dim() == 1 and p.get("bias") is None for p in parameters)


def _are_shared(linears: list[Any], projections: int, layout: BlockLayout) -> bool:
    """Whether linears with one input can take it in one form, and those of the MLP agree."""
    first, mlp = linears[0], linears[projections + 1 :]
    if not LINEAR.agree(linears) and not (LINEAR.agree(linears[:projections]) and (not mlp or LINEAR.agree(mlp))):
        return False
    for other in linears[1:projections]:
        if not _same_perm(first, other):
            return False
    return not mlp or layout.gate is None or layout.up is None or _same_perm(mlp[0], mlp[1])


def _same_perm(a: Any, b: Any) -> bool:
    """Linears were compared when they were merged."""
    return a._buffers["perm"] is b._buffers["perm"] or (a._shared is not None and a._shared is b._shared)
