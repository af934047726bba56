"""Modules whose `forward` reads the weight of a linear that they hold, instead of calling the linear.

Found in the source of their class: `self.name.weight`, also by the name of a variable or of a loop over a list, and in
methods that `forward` calls. Reads in branches that this module never takes do not count.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from torch_int4.support.forwards import source_of

EACH = "*"  # in a path: any child
UNKNOWN = object()
COMPARES: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}

Path = tuple[str, ...]
Conditions = tuple[tuple[ast.expr, bool], ...]


class Read(NamedTuple):
    """A weight that is read: of the module at a path, where all conditions hold."""

    path: Path
    when: Conditions


def weights_read(module: nn.Module) -> list[nn.Module]:
    """The modules inside of `module` whose `weight` its `forward` reads, were it None."""
    found: list[nn.Module] = []
    kind: Any = type(module)
    for read in _reads(kind):
        if all(_may_be(test, module, wanted) for test, wanted in read.when):
            found += _at(module, read.path)
    return found


def _may_be(test: ast.expr, module: nn.Module, wanted: bool) -> bool:
    value = _value(test, module)
    return value is UNKNOWN or bool(value) is wanted


@functools.cache
def _reads(kind: type) -> tuple[Read, ...]:
    if kind.__module__.split(".")[0] in ("torch", "torch_int4"):
        return ()
    return tuple(_Reader(kind).of("forward", kind.__mro__, ()))


class _Reader:
    """Walks through a method and those that it calls."""

    def __init__(self, kind: type) -> None:
        self.kind, self.entered = kind, [""]

    def of(self, name: str, classes: tuple[type, ...], when: Conditions) -> Iterator[Read]:
        """Reads in the first method of that name among classes."""
        owner = next((each for each in classes if name in vars(each)), None)
        if owner is None or owner.__module__.startswith("torch.") or (mark := f"{owner}.{name}") in self.entered:
            return
        function = inspect.unwrap(vars(owner)[name])
        source = source_of(function) if inspect.isfunction(function) else None
        if source is not None:
            self.entered.append(mark)
            after = self.kind.__mro__[self.kind.__mro__.index(owner) + 1 :]
            yield from self.walk(source.body, _variables(source), after, when)
            self.entered.pop()

    def walk(self, node: Any, names: Mapping[str, Path], after: tuple[type, ...], when: Conditions) -> Iterator[Read]:
        """Reads in a syntax tree, or in a list of them."""
        if isinstance(node, list):
            for each in node:
                yield from self.walk(each, names, after, when)
            return
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = _path(node.value, names)
            if path:
                yield Read(path, when)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func.value)
            if called in ("self", "super()"):
                classes = self.kind.__mro__ if called == "self" else after
                yield from self.of(node.func.attr, classes, when)
        for part, also in _parts(node):
            yield from self.walk(part, names, after, (*when, *also))


def _parts(node: ast.AST) -> Iterator[tuple[Any, Conditions]]:
    """The children of a node that need values, with the conditions under which they run."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "hasattr"):
        return  # None will do
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
        return
    if isinstance(node, (ast.If, ast.IfExp)):
        yield node.test, ()
        yield node.body, ((node.test, True),)
        yield node.orelse, ((node.test, False),)
    elif isinstance(node, ast.BoolOp):
        wanted = isinstance(node.op, ast.And)
        for place, value in enumerate(node.values):
            yield value, tuple((earlier, wanted) for earlier in node.values[:place])
    else:
        for child in ast.iter_child_nodes(node):
            yield child, ()


def _variables(source: ast.FunctionDef) -> dict[str, Path]:
    """Variables that are always one module of `self`, or run over a list of its modules."""
    found: dict[str, Path] = {}
    target: ast.expr
    for node in ast.walk(source):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            target, path = node.targets[0], _path(node.value, found)
        elif isinstance(node, ast.For):
            target, path = node.target, _path(node.iter, found)
            if isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) == "enumerate" and node.iter.args:
                target = target.elts[-1] if isinstance(target, ast.Tuple) else target
                path = _path(node.iter.args[0], found)
            path = (*path, EACH) if path else None
        else:
            continue
        if path and isinstance(target, ast.Name):
            found[target.id] = path
    return found


def _path(node: ast.expr, names: Mapping[str, Path]) -> Path | None:
    """The way from `self` to a module; () is `self`, None something else."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else names.get(node.id)
    if isinstance(node, ast.Attribute):
        before = _path(node.value, names)
        return None if before is None else (*before, node.attr)
    if isinstance(node, ast.Subscript):
        before = _path(node.value, names)
        return before if isinstance(node.slice, ast.Slice) or not before else (*before, EACH)
    return None


def _at(module: nn.Module, path: Path) -> list[nn.Module]:
    found: list[Any] = [module]
    for name in path:
        inside = [each for each in found if isinstance(each, nn.Module)]
        if name == EACH:
            found = [child for each in inside for child in each.children()]
        else:
            found = [each._modules[name] for each in inside if name in each._modules]
    return [each for each in found if isinstance(each, nn.Module)]


def _value(test: ast.expr, module: nn.Module) -> Any:
    """The value of a condition for a module that is not trained and whose linears have no weight, if that is known."""
    if isinstance(test, ast.Constant):
        return test.value
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, module)
        return UNKNOWN if value is UNKNOWN else not value
    if isinstance(test, ast.BoolOp):
        stops = isinstance(test.op, ast.Or)
        values = [_value(each, module) for each in test.values]
        if any(value is not UNKNOWN and bool(value) is stops for value in values):
            return stops
        return UNKNOWN if any(value is UNKNOWN for value in values) else not stops
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, right = _value(test.left, module), _value(test.comparators[0], module)
        compare = COMPARES.get(type(test.ops[0]))
        return UNKNOWN if compare is None or left is UNKNOWN or right is UNKNOWN else _compared(compare, left, right)
    if isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance" and len(test.args) == 2:
        return False if _value(test.args[0], module) is None else UNKNOWN
    return _plain(test, module)


def _plain(test: ast.expr, module: nn.Module) -> Any:
    """The value of `self.some.attribute`, where it is a plain one."""
    path = _path(test, {})
    if not path:
        return UNKNOWN
    if path == ("training",):
        return False
    found: Any = module
    for place, name in enumerate(path):
        if name == "weight" and isinstance(found, nn.Module):
            return None if place == len(path) - 1 else UNKNOWN
        try:
            found = getattr(found, name)
        except AttributeError:
            return UNKNOWN
    return found if found is None or isinstance(found, (bool, int, float, str)) else UNKNOWN


def _compared(compare: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    try:
        return bool(compare(left, right))
    except TypeError:
        return UNKNOWN
