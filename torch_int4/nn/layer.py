"""Fused decoder layers: one operator call in the place of a layer, with our KV cache; with other caches, or none, five.

The five are norm and projections; rotation; attention; output projection and sum; norm, MLP and sum. Layers with norms
or factors at other places run in such steps with our cache, too (see layer_steps.py). What the operators do not serve
(gradients, training, hooks on the modules inside, adapters, weights left in float) runs as the stock layer would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.cache.int4_cache import Int4Cache
from torch_int4.layouts.layer import KnownBlock
from torch_int4.nn.attention import named
from torch_int4.nn.layer_facts import LayerFacts
from torch_int4.nn.layer_parts import find_facts
from torch_int4.nn.layer_steps import LayerSteps
from torch_int4.nn.prepared import PreparedLayer, layers
from torch_int4.nn.stack import running
from torch_int4.nn.told import tell_of_hooks
from torch_int4.ops.calls import call
from torch_int4.support.mixins import Mixin


class FusedBlock(Mixin):
    """Mixed into decoder layers of families that have a `BlockLayout`."""

    torch_int4_data: KnownBlock

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`[batch, tokens, features]` to the same."""
        known = self.torch_int4_data
        args, kwargs = named(args, kwargs, known.positional)
        output = None
        if not args and not any(kwargs.get(name) is not None for name in known.layout.absent):
            output = _run(self, hidden_states, kwargs if known.cache is None else _renamed(self, kwargs))
        if output is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return (output, None) if known.layout.returns_weights else output

    def extra_repr(self) -> str:
        """The text that `print(model)` adds."""
        return "fused by torch_int4"


def _renamed(block: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer, the KV cache under the name that its attention has for it."""
    known = block.torch_int4_data
    attention = getattr(block._modules.get(known.layout.attention), "torch_int4_data", None)
    if attention is None:
        return kwargs
    return {attention.cache if name == known.cache else name: value for name, value in kwargs.items()}


def _run(block: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The output of a layer, or None where the operators do not serve it."""
    if torch.compiler.is_compiling():
        return _run_compiled(block, x, kwargs)
    turn = running.turn
    output = None if turn is None else turn.run(block, x, kwargs)
    return _run_alone(block, x, kwargs) if output is None else output


def _run_compiled(block: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The output of a layer of which a graph is made, or None where the operators do not serve it.

    In steps: of a whole layer inductor would compute masks and angles again for the next one, from a length that this
    one has advanced.
    """
    facts = find_facts(block, x, kwargs)
    return None if facts is None else LayerSteps(facts).run(x, kwargs)


def _run_alone(block: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The output of a layer, or None where the operators do not serve it.

    Where no gradients are recorded it is prepared for the next time.
    """
    layer = layers.get(block)
    if layer is not None and layer.serves(x, kwargs):
        return layer.run(x, kwargs)
    facts = find_facts(block, x, kwargs)
    if facts is None:
        layers.pop(block, None)  # it may hold weights that nothing else does
        if not torch.is_grad_enabled() and not block.training:
            tell_of_hooks(block)
        return None
    if not torch.is_grad_enabled() and type(x) is Tensor:
        layers[block] = layer = PreparedLayer(facts, x.dtype)
        return layer.run(x, kwargs)
    if facts.is_whole and isinstance(kwargs.get(facts.attention.torch_int4_data.cache), Int4Cache):
        return _run_whole(facts, x, kwargs)
    return LayerSteps(facts).run(x, kwargs)


def _run_whole(facts: LayerFacts, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The output of a whole layer with our cache."""
    attention = facts.attention
    cache = kwargs[attention.torch_int4_data.cache].layer(attention.layer_idx)
    cache.reserve(x, *attention.kv_sizes())
    cos, sin, rotary = attention.rotation(kwargs)
    output: Tensor = call(
        torch.ops.torch_int4.decoder_layer.default,
        x,
        **facts.whole(),
        cos=cos,
        sin=sin,
        key_cache=cache.stored_keys,
        value_cache=cache.stored_values,
        key_scales=cache.key_scales,
        value_scales=cache.value_scales,
        length=cache.length,
        mask=attention.mask(kwargs),
        rotary_dim=rotary["rotary_dim"],
        **attention.scoring(),
    )
    cache.advance(x.shape[1])
    return output
