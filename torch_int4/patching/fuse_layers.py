"""The decoder layer half of a patch: layers whose computation we know run in one operator call, or in a few."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from torch_int4.layouts.family import Family
from torch_int4.support.forwards import cache_argument, fingerprint

if TYPE_CHECKING:
    from torch_int4.layouts.layer import BlockLayout


def fuse(model: nn.Module, by_module: dict[int, Family]) -> int:
    """Fuse decoder layers in place, after their attention was; the number of them."""
    count = 0
    for module in model.modules():
        family = by_module.get(id(module))
        if family is not None:
            count += any(_fuse_module(module, layout) for layout in family.blocks)
    return count


def _fuse_module(module: nn.Module, layout: BlockLayout) -> bool:
    attention, mlp = module._modules.get(layout.attention), module._modules.get(layout.mlp)
    norms = [module._modules.get(name) for name in layout.norms]
    if attention is None or mlp is None or None in norms or "forward" in module.__dict__:
        return False
    from torch_int4.layouts.layer import KnownBlock
    from torch_int4.nn.attention import FusedAttention
    from torch_int4.nn.layer import FusedBlock
    from torch_int4.nn.layer_parts import ACTIVATIONS
    from torch_int4.support.mixins import mix_in

    if isinstance(module, FusedBlock) or not isinstance(attention, FusedAttention):
        return False
    if type(norms[0]) is not type(norms[-1]) or not all(map(functools.partial(_is_norm, layout), norms)):
        return False
    kinds: tuple[Any, Any, Any] = (type(module), type(mlp), type(norms[0]))
    if not all(want is None or fingerprint(kind) == want for kind, want in zip(kinds, layout.forwards, strict=True)):
        return False
    if cache_argument(kinds[0]) != attention.torch_int4_data.cache:
        return False
    if any(_attribute(module, name) != value for name, value in layout.when):
        return False
    if not all(isinstance(mlp._modules.get(name), nn.Module) for name in layout.linears):
        return False
    if type(getattr(mlp, layout.activation, None)).__name__ not in ACTIVATIONS:
        return False
    return mix_in(FusedBlock, module, KnownBlock(layout, *kinds[1:]))


def _is_norm(layout: BlockLayout, norm: Any) -> bool:
    if layout.forwards[2] is None and (type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1):
        return False
    return hasattr(norm, layout.eps) and getattr(norm, "weight", None) is not None


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
