"""The decoder layer half of a patch: layers whose computation we know run in one operator call, or in a few."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from torch_int4.layouts.family import Family
from torch_int4.patching.refusals import Refusals, attribute, other_settings, unknown_forward, wrong_children
from torch_int4.support.forwards import cache_argument, fingerprint, parameters, positional

if TYPE_CHECKING:
    from torch_int4.layouts.layer import BlockLayout, KnownBlock


def fuse(model: nn.Module, by_module: dict[int, Family], refusals: Refusals) -> int:
    """Fuse decoder layers in place, after their attention was; the number of them."""
    count = 0
    for module in model.modules():
        family = by_module.get(id(module))
        if family is not None and family.blocks:
            count += _fuse_module(module, family, refusals)
    return count


def _fuse_module(module: nn.Module, family: Family, refusals: Refusals) -> bool:
    from torch_int4.layouts.layer import KnownBlock
    from torch_int4.nn.attention import FusedAttention
    from torch_int4.nn.layer import FusedBlock
    from torch_int4.support.mixins import mix_in

    reasons: list[str] = []
    for layout in family.blocks:
        attention = module._modules.get(layout.attention)
        if isinstance(module, FusedBlock) or not isinstance(attention, FusedAttention):
            continue  # attention that was refused is in the report already
        known = _known(module, layout, family)
        if isinstance(known, KnownBlock):
            return mix_in(FusedBlock, module, known)
        reasons.append(known)
    if reasons:
        refusals.add(module, max(reasons)[1])  # that of the layout which is nearest
    return False


def _known(module: nn.Module, layout: BlockLayout, family: Family) -> KnownBlock | tuple[int, str]:
    """The facts known of a layer whose attention is fused; or how far the layout is true of it, and why no further."""
    from torch_int4.layouts.layer import KnownBlock

    for step, check in enumerate((_check_forwards, _check_settings, _check_children, _check_parts)):
        reason = check(module, layout, family)
        if reason is not None:
            return step, reason
    kind: Any = type(module)
    mlp, norm = type(layout.mlp_of(module)), type(module._modules[layout.norms[0]])
    attention: Any = module._modules[layout.attention]
    cache = cache_argument(kind)
    return KnownBlock(
        layout, mlp, norm, positional(kind.forward), None if cache == attention.torch_int4_data.cache else cache
    )


def _check_forwards(module: nn.Module, layout: BlockLayout, family: Family) -> str | None:
    if "forward" in module.__dict__:
        return "has another forward than its class"
    names = ("", layout.mlp, layout.norms[0])
    for name, want in zip(names, layout.forwards, strict=True):
        part = module._modules.get(name) if name else module
        kind: Any = type(part)
        if part is not None and want is not None and fingerprint(kind) != want:
            return unknown_forward(f"the forward of its {name}" if name else "its forward", family)
    return None


def _check_settings(module: nn.Module, layout: BlockLayout, family: Family) -> str | None:
    reason = other_settings(module, layout.when, family)
    if reason is not None:
        return reason
    if layout.residual_scale is not None and not isinstance(attribute(module, layout.residual_scale), (int, float)):
        return f"has {layout.residual_scale} = {attribute(module, layout.residual_scale)!r}, which is no number"
    attention: Any = module._modules[layout.attention]
    kind: Any = type(module)
    cache = cache_argument(kind)
    if cache is None:
        return "takes no KV cache by a name that torch_int4 knows"
    from torch_int4.nn.attention import HARMLESS

    inner = attention.torch_int4_data.layout
    known = {*HARMLESS, cache, *layout.absent, *filter(None, [inner.unrotated, inner.bias])}
    for name in parameters(kind.forward) - known:
        return f"takes an argument {name}, which torch_int4 does not know"
    return None


def _check_children(module: nn.Module, layout: BlockLayout, family: Family) -> str | None:
    inside, outside = (*layout.linears, layout.activation), (*layout.norms, layout.attention)
    if not layout.mlp:
        return wrong_children(module, (*outside, *inside))
    reason = wrong_children(module, (*outside, layout.mlp, *filter(None, [layout.beside_mlp])))
    if reason is not None or layout.calls_mlp:
        return reason
    return wrong_children(layout.mlp_of(module), inside, f"its {layout.mlp} ")


def _check_parts(module: nn.Module, layout: BlockLayout, family: Family) -> str | None:
    from torch_int4.nn.layer_parts import ACTIVATIONS, activation_kind

    norms = [module._modules[name] for name in layout.norms]
    for name, norm in zip(layout.norms, norms, strict=True):
        if type(norm) is not type(norms[0]) or not _is_norm(layout, norm):
            return f"its {name} is a {type(norm).__name__} that its family does not know"
    if layout.calls_mlp or layout.calls_activation:
        return None
    activation: Any = layout.mlp_of(module)._modules[layout.activation]
    kind, name = activation_kind(activation, layout), type(activation).__name__
    if kind is None:
        return f"its activation {name} is not among {', '.join(ACTIVATIONS)}"
    if layout.own_activation is not None and name == layout.own_activation[0] and not _is_activation(activation, kind):
        return f"its activation {name} is not the {kind} that its family says"
    return None


def _is_activation(activation: Any, kind: str) -> bool:
    """Whether a module computes what operators call so."""
    x = torch.linspace(-8, 8, 257)
    want = F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    with torch.no_grad():
        return torch.allclose(activation(x), want, rtol=0, atol=2e-6)


def _is_norm(layout: BlockLayout, norm: Any) -> bool:
    if layout.forwards[2] is None and (type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1):
        return False
    return hasattr(norm, layout.eps) and getattr(norm, "weight", None) is not None
