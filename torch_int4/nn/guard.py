"""The check that modules are as they were when a layer was prepared: made for every token, so in few long lists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from torch_int4 import _C


class Guard:
    """The things that must not change: entries of dictionaries, hooks and classes of modules, the dtype of parameters.

    Every token asks, and between two tokens the weights have gone through the processor's caches, so that what is slow
    is memory: lists lie close together, and hooks are only looked at once torch has made a handle for a new one.

    Args:
        dtype: of x and of `parameters`.
        modules: those that must keep their class, their `forward`, and be without hooks.
        parameters: tensors that must keep their dtype, which `.to()` changes in place.
    """

    def __init__(self, dtype: torch.dtype, modules: Iterable[Any], parameters: Iterable[Tensor] = ()) -> None:
        self._modules, self.dtype, self._parameters = list(modules), dtype, list(parameters)
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._contents: list[Any] = []
        self._classes = [type(module) for module in self._modules]
        self._handles = -1  # that torch had made when there were no hooks
        for module in self._modules:
            self.watch(vars(module), "forward")

    def watch(self, owner: dict[str, Any], *names: str) -> None:
        """Guards entries of a dictionary, which must stay the same objects; what is missing has to stay so."""
        for name in names:
            self._owners.append(owner)
            self._names.append(name)
            self._values.append(owner.get(name))

    def watch_all(self, owner: dict[str, Any]) -> None:
        """Guards all that a dictionary holds, and that nothing is added."""
        self._contents.append(owner)
        for entry in owner.items():
            self._contents += entry

    def include(self, other: Guard) -> None:
        """Guards what another one of the same dtype does, too."""
        self._owners += other._owners
        self._names += other._names
        self._values += other._values
        self._contents += other._contents
        self._modules += other._modules
        self._classes += other._classes
        self._parameters += other._parameters
        self._handles = -1

    def holds(self, x: Tensor) -> bool:
        """Whether nothing has changed, and x is a plain tensor of the dtype, and no gradients are recorded."""
        dtype = self.dtype
        if torch.is_grad_enabled() or type(x) is not Tensor or x.dtype is not dtype or _has_any_global_hook():
            return False
        if not _C.entries_are(self._owners, self._names, self._values) or not _C.contents_are(self._contents):
            return False
        if not _C.types_are(self._modules, self._classes) or not _C.attributes_are(self._parameters, "dtype", dtype):
            return False
        return self._handles == RemovableHandle.next_id or self._without_hooks()

    def _without_hooks(self) -> bool:
        made = RemovableHandle.next_id
        if any(module._forward_hooks or module._forward_pre_hooks for module in self._modules):
            return False
        self._handles = made
        return True
