"""Tied weights: what Hugging Face models remember about them has to forget the linears that were replaced.

`tie_weights()`, which loading, resizing and users call, would otherwise look for a weight that is gone, or
put a float weight onto an int4 module.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

FLAG = "tie_word_embeddings"
KEYS = "_tied_weights_keys"
EXPANDED = "all_tied_weights_keys"


def record(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, str]]]:
    """(name, module, {tied parameter: its source}) of every module that ties weights; to call beforehand."""
    found = []
    for name, module in model.named_modules():
        expand = getattr(module, "get_expanded_tied_weights_keys", None)
        if callable(expand) and getattr(module, KEYS, None):
            found.append((name, module, dict(expand(all_submodels=False))))
    return found


def forget(model: nn.Module, records: list[tuple[str, nn.Module, dict[str, str]]], replaced: set[str]) -> None:
    """Drop every tie of weights of the `replaced` modules, given by name, and leave all others.

    A config says of all ties of its models at once whether they hold, and goes on doing so while any is left.
    """
    fewer: list[nn.Module] = []
    still_tied: set[int] = set()
    for name, module, ties in records:
        kept = _without(ties, _relative(replaced, name))
        if len(kept) != len(ties):
            setattr(module, KEYS, kept)
            fewer.append(module)
        if any(_holder(module, target) is not _holder(module, source) for target, source in kept.items()):
            still_tied.update(id(part) for part in _configs(module))
    for module in fewer:
        _clear_flag(module, still_tied)
    for name, module in model.named_modules():
        expanded = getattr(module, EXPANDED, None)
        if isinstance(expanded, dict):
            setattr(module, EXPANDED, _without(expanded, _relative(replaced, name)))


def _relative(names: set[str], owner: str) -> set[str]:
    prefix = owner + "." if owner else ""
    return {name[len(prefix) :] for name in names if name.startswith(prefix)}


def _without(ties: dict[str, str], gone: set[str]) -> dict[str, str]:
    """The ties but those of the weights of modules; what ties their biases stays true."""

    def stays(parameter: str) -> bool:
        holder, _, name = parameter.rpartition(".")
        return name == "bias" or holder not in gone

    return {target: source for target, source in ties.items() if stays(target) and stays(source)}


def _holder(module: nn.Module, parameter: str) -> nn.Module:
    """The module of a parameter; parameters of one that stands in several places are one without being tied."""
    return module.get_submodule(parameter.rpartition(".")[0])


def _configs(module: nn.Module) -> list[Any]:
    config: Any = getattr(module, "config", None)
    return [part for part in (config, getattr(config, "text_config", None)) if part is not None]


def _clear_flag(module: nn.Module, still_tied: set[int]) -> None:
    if any(_reads_flag(part) for part in module.modules()):
        return  # UMT5 and others scale the input of the head by this flag: the trimmed keys have to do
    for part in _configs(module):
        if getattr(part, FLAG, False) and id(part) not in still_tied:
            setattr(part, FLAG, False)


def _reads_flag(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and FLAG in code.co_names
