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

from torch_int4.calls import call


class Watched(NamedTuple):
    """An entry of a dictionary that must stay the same object."""

    owner: dict[str, Any]
    name: str
    value: Any


def watch(owner: dict[str, Any], *names: str) -> list[Watched]:
    """Entries of a dictionary as they are now; what is missing has to stay so."""
    return [Watched(owner, name, owner.get(name)) for name in names]


class PreparedLayer:
    """A layer whose linears and norms `prepare_decoder_layer` has looked at.

    Args:
        attention, mlp: modules of the layer.
        modules: all others that take part.
        watched: what must not change, besides classes and hooks of the modules.
        scales: parameters that must have the dtype of x.
        dtype: of x.
        options: arguments of `prepare_decoder_layer`, besides the sizes of heads.
    """

    def __init__(
        self,
        attention: Any,
        mlp: Any,
        modules: Iterable[Any],
        watched: Iterable[Watched],
        scales: list[Tensor],
        dtype: torch.dtype,
        options: dict[str, Any],
    ) -> None:
        every = (attention, mlp, *modules)
        self.cache = attention.torch_int4_data.cache  # the argument of `forward`
        self.attention, self.mlp, self.scales, self.dtype = attention, mlp, scales, dtype
        self._heads, self._size = attention.kv_sizes()
        self.watched = [*watched, *(entry for module in every for entry in watch(vars(module), "forward"))]
        self.hooks = [hooks for module in every for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.classes = [(module, type(module)) for module in every]
        operators = torch.ops.torch_int4
        self.number = operators.prepare_decoder_layer(
            **options, kv_heads=self._heads, head_size=self._size, value_size=self._size
        )
        weakref.finalize(self, operators.release_decoder_layer, self.number).atexit = False

    def serves(self, block: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether nothing has changed, and x and the arguments of `forward` are what the operators take.

        This runs for every layer and token: plain loops, no generators.
        """
        if torch.is_grad_enabled() or type(x) is not Tensor or x.dtype is not self.dtype:
            return False
        if block.training or self.mlp.training or _has_any_global_hook():
            return False
        for owner, name, value in self.watched:
            if owner.get(name) is not value:
                return False
        for hooks in self.hooks:
            if hooks:
                return False
        for module, kind in self.classes:
            if type(module) is not kind:
                return False
        for scale in self.scales:
            if scale.dtype is not self.dtype:
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
