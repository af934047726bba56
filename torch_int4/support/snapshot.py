"""A model as it is: what modules hold and are, for putting it back after an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

Kept = tuple[dict[str, Any], list[tuple[dict[Any, Any], dict[Any, Any]]]]


class Snapshot:
    """The class and the attributes of every module of a model, and those of their configs, by reference.

    Values of tensors are not copied; tensors that were given other values by `tensor.data = …` get their own back. A
    snapshot keeps everything alive that the modules hold.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, type(module), _kept(module)) for module in model.modules()]
        configs = {id(found): found for module in model.modules() for found in _configs(module)}
        self._configs = [(config, _kept(config)) for config in configs.values()]
        self._tensors = [(tensor, tensor.data, tensor.requires_grad) for tensor in _tensors(model)]

    def restore(self) -> None:
        """Puts every module back as it was."""
        for module, kind, kept in self._modules:
            module.__class__ = kind
            _put_back(module, kept)
        for config, kept in self._configs:
            _put_back(config, kept)
        for tensor, data, trained in self._tensors:
            _give_back(tensor, data)
            tensor.requires_grad_(trained)


@contextlib.contextmanager
def values_kept(module: nn.Module) -> Iterator[None]:
    """If the block fails, tensors of a module that were given other values by `tensor.data = …` have their own again,
    and buffers are the tensors that they were."""
    parts = [(part._buffers, dict(part._buffers)) for part in module.modules()]
    before = [(tensor, tensor.data) for tensor in _tensors(module)]
    try:
        yield
    except BaseException:
        for buffers, own in parts:
            buffers.update(own)
        for tensor, data in before:
            _give_back(tensor, data)
        raise


def _tensors(model: nn.Module) -> list[Tensor]:
    """Those without tricks of their own; other backends have classes of tensors, which nobody gives other values."""
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if type(tensor) in (Tensor, nn.Parameter)]


def _give_back(tensor: Tensor, data: Tensor) -> None:
    if tensor.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype:
        tensor.data = data


def _configs(module: nn.Module) -> list[Any]:
    config = getattr(module, "config", None)
    found = [config, getattr(module, "generation_config", None)]
    found += [part for part in getattr(config, "__dict__", {}).values() if hasattr(part, "model_type")]
    return [each for each in found if not isinstance(each, nn.Module) and hasattr(each, "__dict__")]


def _kept(owner: Any) -> Kept:
    """The attributes, and the contents of those that are dictionaries, which others may hold too."""
    attributes = dict(vars(owner))
    return attributes, [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]


def _put_back(owner: Any, kept: Kept) -> None:
    attributes, tables = kept
    vars(owner).clear()
    vars(owner).update(attributes)
    for table, content in tables:
        table.clear()
        table.update(content)
