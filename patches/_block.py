"""The decoder layer half of a patch: layers whose computation we know run in five operator calls."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

from torch import nn

from .families import Family

if TYPE_CHECKING:
    from ..block_layout import BlockLayout


def fuse(model: nn.Module, by_module: dict[int, Family]) -> int:
    """Fuse decoder layers in place, after their attention was; the number of them."""
    count = 0
    for module in model.modules():
        family = by_module.get(id(module))
        if family is not None and family.block is not None:
            count += _fuse_module(module, family.block)
    return count


def _fuse_module(module: nn.Module, layout: BlockLayout) -> bool:
    attention, mlp = module._modules.get(layout.attention), module._modules.get(layout.mlp)
    norms = [module._modules.get(name) for name in (layout.input_norm, layout.post_norm)]
    if attention is None or mlp is None or None in norms or "forward" in module.__dict__:
        return False
    from ..attention import FusedAttention
    from ..block import ACTIVATIONS, FusedBlock
    from ..block_layout import KnownBlock
    from ..subclass import mix_in

    if not isinstance(attention, FusedAttention) or not isinstance(attention.torch_int4_data.projections, tuple):
        return False
    if isinstance(module, FusedBlock) or type(norms[0]) is not type(norms[1]):
        return False
    kinds = (type(module), type(mlp), type(norms[0]))
    if tuple(map(fingerprint, kinds)) != layout.forwards:
        return False
    linears = (layout.gate, layout.up, layout.down)
    if not all(isinstance(mlp._modules.get(name), nn.Module) for name in linears):
        return False
    if type(getattr(mlp, layout.activation, None)).__name__ not in ACTIVATIONS:
        return False
    if not all(hasattr(norm, layout.eps) and hasattr(norm, "weight") for norm in norms):
        return False
    return mix_in(FusedBlock, module, KnownBlock(layout, *kinds[1:]))


@functools.cache
def fingerprint(kind: type) -> str:
    """What the `forward` of a class computes: a hash of its source without annotations, comments and decorators.

    Classes that are copied from each other have the same one, and a class that was changed has another; "" is that
    of a class without source.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError, AttributeError):
        return ""
    function: Any = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return ""
    function.decorator_list, function.returns = [], None
    for node in ast.walk(function.args):
        if isinstance(node, ast.arg):
            node.annotation = None
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return hashlib.sha256(ast.unparse(function).encode()).hexdigest()[:16]
