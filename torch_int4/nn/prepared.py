"""Decoder layers whose checks and argument lists were made once: most of what a token costs besides its arithmetic.

Operators of a layer take some fifty tensors, and finding out that a layer is still the one that was patched takes
longer than small layers compute. A prepared layer keeps both results, and what they rest on: modules, parameters,
buffers, attributes and hooks, by identity. If any of it has changed, the layer is looked at anew.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from torch_int4.cache.int4_cache import Int4Cache
from torch_int4.nn.layer_facts import LayerFacts
from torch_int4.nn.layer_steps import LayerSteps
from torch_int4.ops.calls import call


class PreparedLayer:
    """A layer with the arguments of operators made, and if one operator can run it for that checked.

    Holds modules inside the layer and not the layer itself, which would keep it alive.

    Args:
        facts: of the layer.
        dtype: of its input.
    """

    def __init__(self, facts: LayerFacts, dtype: torch.dtype) -> None:
        self.attention, self.guard = facts.attention, facts.guard(dtype)
        self.cache = facts.attention.torch_int4_data.cache  # the argument of `forward`
        self._heads, self._size = facts.attention.kv_sizes()
        self.is_whole = facts.is_whole
        self._arguments, self._steps = facts.whole() if self.is_whole else {}, LayerSteps(facts)

    @functools.cached_property
    def number(self) -> int:
        """The number of the layer among those that `prepare_decoder_layer` has checked."""
        operators = torch.ops.torch_int4
        sizes = {"kv_heads": self._heads, "head_size": self._size, "value_size": self._size}
        number = int(operators.prepare_decoder_layer(**self._arguments, **sizes))
        weakref.finalize(self, operators.release_decoder_layer, number).atexit = False
        return number

    def serves(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether nothing has changed, and x and the arguments of `forward` are what the operators take."""
        return self.guard.holds(x) and bool(self.attention.serves(x, kwargs))

    def run(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The layer's output `[batch, tokens, features]`; the cache takes its keys and values."""
        if self.is_whole and isinstance(kwargs.get(self.cache), Int4Cache):
            return run_layers([self], x, kwargs)
        return self._steps.run(x, kwargs)


def run_layers(prepared: list[PreparedLayer], x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The output of whole layers that take the same arguments, each on what the one before gave."""
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
        [layer.stored_keys for layer in caches],
        [layer.stored_values for layer in caches],
        [layer.key_scales for layer in caches],
        [layer.value_scales for layer in caches],
        [layer.length for layer in caches],
        attention.mask(kwargs),
        rotary["rotary_dim"],
        scoring["scale"],
        scoring["softcap"],
    )
    for layer in caches:
        layer.advance(x.shape[1])
    return output


# By the layers themselves, so that copies of a layer start without and files of whole modules hold nothing of it.
layers: weakref.WeakKeyDictionary[Any, PreparedLayer] = weakref.WeakKeyDictionary()
