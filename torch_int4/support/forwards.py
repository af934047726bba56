"""The source of a module's `forward`: what it computes, and which arguments it reads.

Layers and attention of a model are only replaced where their source is one that somebody has looked at. A fingerprint
says which one it is, over the versions of transformers that name the KV cache differently.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import operator
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

IMPLEMENTATION = "_attn_implementation"  # the attribute of configs
COMPARES: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda value, several: value in several,
    ast.NotIn: lambda value, several: value not in several,
}
CACHES = ("cache", "past_key_values", "layer_past")  # what arguments with a KV cache are called; the first one is ours


def source_of(function: Any) -> ast.FunctionDef | None:
    """A function as it was written, below its decorators; None where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, AttributeError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


@functools.cache
def cache_argument(kind: type) -> str | None:
    """Name of the argument of a class's `forward` that takes the KV cache; None where it has none, or several."""
    try:
        taken = inspect.signature(inspect.unwrap(kind.forward)).parameters  # type: ignore[attr-defined]
    except (TypeError, ValueError, AttributeError):
        return None
    names = [name for name in CACHES if name in taken]
    return names[0] if len(names) == 1 else None


def cache_keyword(model: Any, cache: Any) -> dict[str, Any]:
    """A KV cache as the keyword argument that a model, or its `generate`, takes it by.

    Models that wrap another one, and take anything, get it by the name that every version of transformers knows.
    """
    kind: Any = type(model)
    return {cache_argument(kind) or "past_key_values": cache}


@functools.cache
def fingerprint(kind: type) -> str:
    """What the `forward` of a class computes: a hash of its source and of the functions and methods of the same file
    that it calls, without annotations, comments and decorators, and whatever the argument with the KV cache is called.

    Classes that are copied from each other have the same one, and a class that was changed has another; a class
    without source has "".
    """
    texts: list[str] = []
    pending, seen = [inspect.unwrap(kind.forward)], set()  # type: ignore[attr-defined]
    while pending:
        function = pending.pop(0)
        source = source_of(function)
        if source is None:
            return ""
        texts.append(_normal_text(source))
        for other in _called(source, function, kind):
            if other not in seen:
                seen.add(other)
                pending.append(other)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _called(source: ast.FunctionDef, function: Any, kind: type) -> Iterator[Any]:
    """Functions and methods that a function names, as far as they are in its file."""
    for node in ast.walk(source):
        found: Any = None
        if isinstance(node, ast.Name):
            found = function.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            found = inspect.getattr_static(kind, node.attr, None)
        found = inspect.unwrap(found) if callable(found) else None
        if isinstance(found, types.FunctionType) and found.__module__ == function.__module__ and found is not function:
            yield found


def _normal_text(function: ast.FunctionDef) -> str:
    """The source without what changes no result."""
    function.decorator_list, function.returns = [], None
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    for node in arguments:
        node.annotation = None
    caches = [node.arg for node in arguments if node.arg in CACHES]
    if len(caches) == 1 and caches[0] != CACHES[0]:
        _rename(function, caches[0], CACHES[0])
    return _text_of(function)


def _text_of(part: Any) -> str:
    """A syntax tree as text that is the same for every version of Python; `ast.unparse` and `ast.dump` are not."""
    if isinstance(part, list):
        return f"[{', '.join(map(_text_of, part))}]"
    if not isinstance(part, ast.AST):
        return repr(part)
    fields = [(name, value) for name, value in ast.iter_fields(part) if value is not None and value != []]
    known = (f"{name}={_text_of(value)}" for name, value in fields if name not in ("ctx", "kind", "type_comment"))
    return f"{type(part).__name__}({', '.join(known)})"


def _rename(function: ast.FunctionDef, old: str, new: str) -> None:
    """Give a variable, and the keyword arguments of its name, another name, unless that means something already."""
    nodes = list(ast.walk(function))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    keywords = [node for node in nodes if isinstance(node, (ast.arg, ast.keyword))]
    if any(node.id == new for node in names) or any(node.arg == new for node in keywords):
        return
    for name in names:
        name.id = new if name.id == old else name.id
    for keyword in keywords:
        keyword.arg = new if keyword.arg == old else keyword.arg


@functools.cache
def arguments_read(function: Any) -> frozenset[str] | None:
    """Names of all keyword arguments that a function may read, or its decorators: its parameters, the arguments that it
    passes on by name, and every string in it. None where it does something else with its `**kwargs` than asking for one
    of them by its name or handing them to a KV cache, or where it has no source.
    """
    source = source_of(function)
    if source is None:
        return None
    others = source.args.kwarg.arg if source.args.kwarg is not None else None
    if others is not None and not _only_asked(source, others):
        return None
    return _names(source) | frozenset(_strings_of_decorators(function))


@functools.cache
def forward_arguments(kind: type) -> frozenset[str] | None:
    """The same of the `forward` of a class whose fingerprint is known, so that it is known who gets its `**kwargs`."""
    function: Any = kind.forward  # type: ignore[attr-defined]
    source = source_of(function)
    return None if source is None else _names(source) | frozenset(_strings_of_decorators(function))


def parameters(function: Any) -> frozenset[str]:
    """Names of the arguments that a method takes, besides `self` and any others as `**kwargs`."""
    found = list(inspect.signature(inspect.unwrap(function)).parameters.values())[1:]
    return frozenset(each.name for each in found if each.kind is not each.VAR_KEYWORD)


def positional(function: Any) -> tuple[str, ...]:
    """Names of the arguments that a method takes by their place, after `self` and the first one."""
    found = list(inspect.signature(inspect.unwrap(function)).parameters.values())[2:]
    return tuple(each.name for each in found if each.kind is each.POSITIONAL_OR_KEYWORD)


def _names(source: ast.FunctionDef) -> frozenset[str]:
    arguments = source.args
    found = {node.arg for node in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    for node in ast.walk(source):
        if isinstance(node, ast.keyword) and node.arg is not None:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return frozenset(found)


def _only_asked(source: ast.FunctionDef, kwargs: str) -> bool:
    """Whether every use of `**kwargs` is `kwargs.get("name", …)`, `kwargs["name"]` or `cache.update(kwargs=kwargs)`."""
    asked = 0
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == kwargs and node.func.attr in ("get", "pop"):
                asked += bool(node.args) and isinstance(node.args[0], ast.Constant)
            elif node.func.attr == "update" and isinstance(owner, ast.Name) and owner.id in CACHES:
                asked += sum(
                    isinstance(k.value, ast.Name) and k.value.id == kwargs and k.arg is not None for k in node.keywords
                )
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == kwargs:
            asked += isinstance(node.slice, ast.Constant)
    return asked == sum(isinstance(node, ast.Name) and node.id == kwargs for node in ast.walk(source))


def _strings_of_decorators(function: Any) -> Iterator[str]:
    """Strings that decorators of a function were given, such as arguments that they rename."""
    while hasattr(function, "__wrapped__"):
        for cell in function.__closure__ or ():
            if isinstance(cell.cell_contents, str):
                yield cell.cell_contents
        function = function.__wrapped__


def attention_function(kind: type, implementation: str) -> Any:
    """The function that attention modules of a class call for an implementation of transformers; None for none."""
    names = inspect.unwrap(kind.forward).__globals__  # type: ignore[attr-defined]
    if implementation == "eager":
        return names.get("eager_attention_forward")
    known = names.get("ALL_ATTENTION_FUNCTIONS")
    return None if known is None else known.get(implementation)


@functools.cache
def tells_apart(kind: type, one: str, other: str) -> bool:
    """Whether a class compares the name of its implementation of attention with others, and two names differ in it.

    It is looked for in the methods of a class, as `config._attn_implementation == "sdpa"` or `in ("eager", "sdpa")`.
    """
    for base in kind.__mro__:
        for function in vars(base).values():
            function = inspect.unwrap(function) if callable(function) else None
            if not isinstance(function, types.FunctionType) or IMPLEMENTATION not in function.__code__.co_names:
                continue
            nodes = ast.walk(source_of(function) or ast.Pass())
            if any(_answer(each, one) != _answer(each, other) for each in nodes if isinstance(each, ast.Compare)):
                return True
    return False


def _answer(compare: ast.Compare, name: str) -> Any:
    """The value of a comparison of the name of an implementation of attention with literals; None for others."""
    sides = [compare.left, *compare.comparators]
    if len(sides) != 2 or not any(isinstance(side, ast.Attribute) and side.attr == IMPLEMENTATION for side in sides):
        return None
    try:
        left, right = (name if isinstance(side, ast.Attribute) else ast.literal_eval(side) for side in sides)
        return COMPARES[type(compare.ops[0])](left, right)
    except (ValueError, TypeError, KeyError):
        return None
