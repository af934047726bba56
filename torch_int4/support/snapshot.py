"""A model as it is: what modules hold and are, for putting it back after an error."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

Kept = tuple[dict[str, Any], list[tuple[dict[Any, Any], dict[Any, Any]]]]


class Snapshot:
    """The class and the attributes of every module of a model, and those of their configs, by reference.

    Values of tensors are not copied. A snapshot keeps everything alive that the modules hold.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, type(module), _kept(module)) for module in model.modules()]
        configs = {id(found): found for module in model.modules() for found in _configs(module)}
        self._configs = [(config, _kept(config)) for config in configs.values()]
        parameters: list[Tensor] = list(model.parameters())
        self._trained = [(parameter, parameter.requires_grad) for parameter in parameters]

    def restore(self) -> None:
        """Puts every module back as it was."""
        for module, kind, kept in self._modules:
            module.__class__ = kind
            _put_back(module, kept)
        for config, kept in self._configs:
            _put_back(config, kept)
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)


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
