"""The model half of a patch: lists of fused layers that a model runs in turn, and nothing in between."""

from __future__ import annotations

import ast
import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from torch_int4.support.forwards import source_of

if TYPE_CHECKING:
    from torch_int4.layouts.layer import KnownBlock


def fuse(model: nn.Module) -> int:
    """Let models run lists of fused layers in one operator call each, in place; the number of such models."""
    from torch_int4.nn.layer import FusedBlock
    from torch_int4.nn.stack import FusedLayers, FusedStack
    from torch_int4.support.mixins import mix_in

    count = 0
    for module in model.modules():
        config = getattr(module, "config", None)  # of any type: models of others may call a dict or a tuple so
        if "forward" in module.__dict__ or "num_hidden_layers" not in getattr(config, "__dict__", ()):
            continue
        for name, blocks in module._modules.items():
            if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
                continue
            fused = all(isinstance(b, FusedBlock) and not b.torch_int4_data.layout.returns_weights for b in blocks)
            kind: Any = type(module)
            if fused and runs_in_turn(kind, name):
                mix_in(FusedLayers, blocks)
                count += mix_in(FusedStack, module, name)
                _fuse_norms(module, blocks[0])
                break
    return count


def _fuse_norms(model: nn.Module, block: Any) -> None:
    """Let the model's own norms, such as that after the last layer, run in one operator call where layers have the
    same ones. `torch.nn.LayerNorm` is one already."""
    from torch_int4.nn.norm import FusedNorm
    from torch_int4.support.mixins import mix_in

    known: KnownBlock = block.torch_int4_data
    for module in filter(None, model._modules.values()):
        if known.norm is not nn.LayerNorm and type(module) is known.norm and "forward" not in vars(module):
            mix_in(FusedNorm, module, known.layout)


@functools.cache
def runs_in_turn(kind: type, name: str) -> bool:
    """Whether the `forward` of a class gives each layer of the list `name` what the one before gave, all of them the
    same arguments if their types are the same, and does nothing else in between.

    That is one loop over `self.name` or `self.name[: self.config.num_hidden_layers]`, without another word of them:

        for i, layer in enumerate(self.name):
            x = layer(x, argument=values[self.config.layer_types[i]], **others)
    """
    function = source_of(kind.forward)  # type: ignore[attr-defined]
    if function is None:
        return False
    nodes = list(ast.walk(function))
    lists = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == name]
    loops = [node for node in nodes if isinstance(node, ast.For) and _is_list(node.iter, name)]
    return len(lists) == len(loops) == 1 and _hands_on(loops[0])


def _is_list(node: ast.expr, name: str) -> bool:
    lists = (f"self.{name}", f"self.{name}[:self.config.num_hidden_layers]")
    return ast.unparse(node) in (*lists, *(f"enumerate({each})" for each in lists))


def _hands_on(loop: ast.For) -> bool:
    names = ast.unparse(loop.target).strip("()").split(", ")
    numbered = ast.unparse(loop.iter).startswith("enumerate")
    if len(names) != 1 + numbered or loop.orelse or len(loop.body) != 1:
        return False
    step = loop.body[0]
    if not isinstance(step, ast.Assign) or len(step.targets) != 1 or not isinstance(step.value, ast.Call):
        return False
    x, called = ast.unparse(step.targets[0]), step.value
    if ast.unparse(called.func) != names[-1] or [ast.unparse(arg) for arg in called.args] != [x]:
        return False
    return not any(_changes(keyword.value, (x, *names)) for keyword in called.keywords)


def _changes(value: ast.expr, names: tuple[str, ...]) -> bool:
    """Whether an argument may be another for each layer: it calls something, or knows the layer or its input."""
    text = ast.unparse(value)
    if len(names) == 3:
        text = text.replace(f"self.config.layer_types[{names[1]}]", "kind")
    nodes = list(ast.walk(ast.parse(text, mode="eval")))
    return any(isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id in names) for node in nodes)
