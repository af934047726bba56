"""Decoder layers whose checks and argument lists were made once: most of what a token costs besides its arithmetic.

`decoder_layer` takes some fifty tensors, and finding out that a layer is still the one that was patched takes longer
than small layers compute. A prepared layer keeps both results, and what they rest on: modules, parameters, buffers,
attributes and hooks, by identity. If any of it has changed, the layer is looked at anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from torch_int4 import _C
from torch_int4.ops.calls import call


class Watched(NamedTuple):
    """An entry of a dictionary that must stay the same object."""

    owner: dict[str, Any]
    name: str
    value: Any


def watch(owner: dict[str, Any], *names: str) -> list[Watched]:
    """Entries of a dictionary as they are now; what is missing has to stay so."""
    return [Watched(owner, name, owner.get(name)) for name in names]


class Guard:
    """What must not change: entries of dictionaries, hooks and classes of modules, the dtype of parameters.

    Every token asks, and between two tokens the weights have gone through the processor's caches, so that what is slow
    is memory: lists lie close together, and hooks are only looked at once torch has made a handle for a new one.

    Args:
        dtype: of x and of `scales`.
        watched: entries.
        modules: those that must keep their class, their `forward`, and be without hooks.
        scales: parameters.
    """

    def __init__(
        self, dtype: torch.dtype, watched: Iterable[Watched], modules: Iterable[Any], scales: Iterable[Tensor]
    ) -> None:
        self._modules, self.dtype, self._scales = list(modules), dtype, list(scales)
        entries = [*watched, *(entry for module in self._modules for entry in watch(vars(module), "forward"))]
        self._owners = [entry.owner for entry in entries]
        self._names = [entry.name for entry in entries]
        self._values = [entry.value for entry in entries]
        self._classes = [type(module) for module in self._modules]
        self._handles = -1  # that torch had made when there were no hooks

    def include(self, other: Guard) -> None:
        """Guard what another one of the same dtype does, too."""
        self._owners += other._owners
        self._names += other._names
        self._values += other._values
        self._modules += other._modules
        self._classes += other._classes
        self._scales += other._scales
        self._handles = -1

    def holds(self, x: Tensor) -> bool:
        """Whether nothing has changed, and x is a plain tensor of the dtype, and no gradients are recorded."""
        dtype = self.dtype
        if torch.is_grad_enabled() or type(x) is not Tensor or x.dtype is not dtype or _has_any_global_hook():
            return False
        if not _C.entries_are(self._owners, self._names, self._values):
            return False
        if not _C.types_are(self._modules, self._classes) or not _C.attributes_are(self._scales, "dtype", dtype):
            return False
        return self._handles == RemovableHandle.next_id or self._without_hooks()

    def _without_hooks(self) -> bool:
        made = RemovableHandle.next_id
        if any(module._forward_hooks or module._forward_pre_hooks for module in self._modules):
            return False
        self._handles = made
        return True


class PreparedLayer:
    """A layer whose linears and norms `prepare_decoder_layer` has looked at.

    Args:
        attention, mlp: modules of the layer.
        guard: what must not change, those two included.
        options: arguments of `prepare_decoder_layer`, besides the sizes of heads.
    """

    def __init__(self, attention: Any, mlp: Any, guard: Guard, options: dict[str, Any]) -> None:
        self.cache = attention.torch_int4_data.cache  # the argument of `forward`
        self.attention, self.mlp, self.guard = attention, mlp, guard
        self._heads, self._size = attention.kv_sizes()
        operators = torch.ops.torch_int4
        self.number = operators.prepare_decoder_layer(
            **options, kv_heads=self._heads, head_size=self._size, value_size=self._size
        )
        weakref.finalize(self, operators.release_decoder_layer, self.number).atexit = False

    def serves(self, block: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether nothing has changed, and x and the arguments of `forward` are what the operators take."""
        if block.training or self.mlp.training or not self.guard.holds(x):
            return False
        return bool(self.attention.serves(x, kwargs))

    def run(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The layer's output `[batch, tokens, features]`; the `Int4Cache` takes its keys and values."""
        return run_layers([self], x, kwargs)


def run_layers(prepared: list[PreparedLayer], x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The output of layers that take the same arguments, each on what the one before gave."""
    first = prepared[0]
    attention, cache = first.attention, kwargs[first.cache]
    caches = [cache.layer(layer.attention.layer_idx) for layer in prepared]
    for layer in caches:
        layer.reserve(x, first._heads, first._size)
    cos, sin, rotary = attention.rotation(kwargs)
    scoring = attention.scoring()
    output: Tensor = call(
        torch.ops.torch_int4.prepared_decoder_layers.default,
        x,
        [layer.number for layer in prepared],
        cos,
        sin,
        [layer.keys for layer in caches],
        [layer.values for layer in caches],
        [layer.key_scales for layer in caches],
        [layer.value_scales for layer in caches],
        [layer.length for layer in caches],
        kwargs.get("attention_mask"),
        rotary["rotary_dim"],
        scoring["scale"],
        scoring["softcap"],
    )
    for layer in caches:
        layer.advance(x.shape[1])
    return output


# By the layers themselves, so that copies of a layer start without and files of whole modules hold nothing of it.
layers: weakref.WeakKeyDictionary[Any, PreparedLayer] = weakref.WeakKeyDictionary()
