"""Fused attention in the place of a stock attention module: projections, rotation into the cache, attention.

What the operators do not serve runs as the stock module would run it: gradients, training, recorded attention weights,
caches of other kinds, other devices. Both paths may take turns on one cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

from torch_int4.cache.int4_cache import Int4Cache
from torch_int4.layouts.attention import AttentionLayout, KnownAttention
from torch_int4.nn.attend import FLOATS, additive, attend, biased, is_bias, is_mask
from torch_int4.ops.calls import call
from torch_int4.support.mixins import Mixin

# Arguments that the operators follow, or that change nothing here. Any other one that the stock module reads, unless it
# is None, is left to the stock module.
HARMLESS = frozenset(
    {
        "hidden_states",
        "attention_mask",
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
    }
)


def named(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, those given by their place under these names; as they are where that is wrong."""
    if not args or len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
        return args, kwargs
    return (), {**dict(zip(names, args, strict=False)), **kwargs}


class StockAttention(Mixin):
    """The stock module, which adds its mask where it records weights: a bool one would hide nothing then."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output of the stock module, with a mask that can be added."""
        mask = kwargs.get("attention_mask")
        if kwargs.get("output_attentions") and isinstance(mask, Tensor) and _adds_masks(self):
            kwargs["attention_mask"] = additive(mask, hidden_states.dtype)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


class FusedAttention(StockAttention):
    """Mixed into the attention modules of families that have an `AttentionLayout`."""

    torch_int4_data: KnownAttention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`[batch, tokens, features]` to the same, and None for the attention weights; or what the stock one gives."""
        args, kwargs = named(args, kwargs, self.torch_int4_data.positional)
        if args or not self.serves(hidden_states, kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        layout = self.torch_int4_data.layout
        outputs = [getattr(self, name)(hidden_states) for name in layout.linears]
        output = getattr(self, layout.output)(self.attend(outputs, kwargs))
        return output if layout.residual is None else kwargs[layout.residual] + output, None

    def serves(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the operators give what the stock module would for these arguments of `forward`."""
        return _is_served(self, self.torch_int4_data, hidden_states, kwargs.get("attention_mask"), kwargs)

    def attend(self, outputs: Sequence[Tensor], kwargs: dict[str, Any]) -> Tensor:
        """The input of the output projection, `[batch, tokens, features]`.

        Args:
            outputs: of the projections.
            kwargs: arguments of `forward`, which `serves` has seen.
        """
        if not self.torch_int4_data.layout.gated:
            return self.attend_heads(*self.split_heads(outputs), kwargs)
        _, size = self.kv_sizes()
        query, gate = outputs[0].view(*outputs[0].shape[:2], -1, 2 * size).chunk(2, dim=-1)
        heads = self.split_heads([query.reshape(*outputs[0].shape[:2], -1), *outputs[1:]])
        return self.attend_heads(*heads, kwargs) * torch.sigmoid(gate.flatten(2))

    def split_heads(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, `[batch, tokens, their heads, head size]`, of what the projections gave."""
        layout = self.torch_int4_data.layout
        size, places = getattr(self, layout.head_dim), outputs[0].shape[:2]
        if len(outputs) > 1:
            query, key, value = (y.view(*places, -1, size) for y in outputs)
        elif layout.concatenated:
            heads, kv_heads = outputs[0].view(*places, -1, size), _kv_heads(self, layout)
            query, key, value = heads.tensor_split((-2 * kv_heads, -kv_heads), dim=2)
        else:
            grouped = outputs[0].view(*places, _kv_heads(self, layout), -1, size)
            query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        return query, key, value

    def kv_sizes(self) -> tuple[int, int]:
        """Heads of keys and values, and the size of a head."""
        layout = self.torch_int4_data.layout
        return _kv_heads(self, layout), getattr(self, layout.head_dim)

    def rotation(self, kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
        """Cosines and sines `[batch or 1, tokens, rotated features or half of them]`, and how they rotate."""
        layout = self.torch_int4_data.layout
        cos, sin = _rotation(self, layout, kwargs)
        dim = 0 if cos is None else cos.shape[-1] * layout.features_per_column
        if layout.repeated and cos is not None and sin is not None:  # operators take one column for each pair
            cos, sin = cos[..., ::2].contiguous(), sin[..., ::2].contiguous()
        return cos, sin, {"rotary_dim": dim, "interleaved": layout.interleaved}

    def mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        """What operators take as the mask: that of `forward`, and what else is added to the scores."""
        layout, mask = self.torch_int4_data.layout, kwargs.get("attention_mask")
        if layout.bias is None or mask is None:
            return mask
        return biased(mask, kwargs[layout.bias], _heads(self, layout), hides=layout.hides)

    def scoring(self) -> dict[str, float]:
        """The factor and the cap of the products of queries and keys."""
        layout = self.torch_int4_data.layout
        return {"scale": _scale(self, layout), "softcap": _softcap(self, layout)}

    def attend_heads(self, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The input of the output projection, `[batch, tokens, features]`.

        Args:
            query: as it was projected, `[batch, tokens, heads, head size]`, as are key and value with their heads.
            kwargs: arguments of `forward`, which `serves` has seen.
        """
        layout = self.torch_int4_data.layout
        cache, mask = kwargs.get(self.torch_int4_data.cache), self.mask(kwargs)
        if layout.norms is not None:
            query, key = (_normed(self, *each) for each in zip(layout.norms, (query, key), strict=True))
        if layout.key_factor is not None:
            key = key * getattr(self, layout.key_factor)
        cos, sin, rotary = self.rotation(kwargs)
        options: dict[str, Any] = self.scoring()
        if layout.sinks is not None:
            options["sinks"] = getattr(self, layout.sinks)
        if isinstance(cache, Int4Cache):
            layer = cache.layer(self.layer_idx)  # type: ignore[attr-defined]
            query = layer.append(query, key, value, cos, sin, **rotary)
            return layer.attend(query, mask, **options).flatten(2)
        query, key, value = _rotate(query, key, value, cos, sin, rotary)
        if cache is not None:
            if layout.repeats_kv and getattr(self, layout.repeats_kv):
                repeats = query.shape[2] // key.shape[1]
                key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
            key, value = cache.update(key, value, self.layer_idx)  # type: ignore[attr-defined]
        return attend(query, key, value, mask, causal=True, **options).flatten(2)

    def extra_repr(self) -> str:
        """The text that `print(model)` adds."""
        return "fused by torch_int4"


def _is_served(module: Any, known: KnownAttention, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the operators give what the stock module would."""
    layout = known.layout
    if module.training or x.dim() != 3 or x.dtype not in FLOATS or not x.is_cpu:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        return False
    if kwargs.get("output_attentions") or not is_mask(mask):
        return False
    if layout.implementation is None:
        if mask is None:
            return False
    # The user chose another one since; a config takes a microsecond for each attribute that it is asked for.
    elif vars(module.config)["_attn_implementation_internal"] != layout.implementation or (
        mask is None and not module.is_causal
    ):
        return False
    own = (known.cache, layout.unrotated, layout.bias, layout.residual)
    for name, value in kwargs.items():
        if name in HARMLESS or value is None or name in own:
            continue
        if known.read is None or name in known.read:
            return False
    if layout.bias is not None and not is_bias(kwargs.get(layout.bias), mask, _heads(module, layout), layout.hides):
        return False
    return _is_cache(module, layout, kwargs.get(known.cache)) and _has_rotation(module, layout, kwargs)


def _adds_masks(module: Any) -> bool:
    """Whether the stock module takes masks of transformers, which are added where weights are recorded."""
    known = getattr(module, "torch_int4_data", None)
    return not isinstance(known, KnownAttention) or known.layout.implementation is not None


def _is_cache(module: Any, layout: AttentionLayout, cache: Any) -> bool:
    if isinstance(cache, Int4Cache):  # which a stock module that repeats key heads may have filled
        return layout.repeats_kv is None or cache.layer(module.layer_idx).holds(_kv_heads(module, layout))
    return cache is None or (type(cache) in (DynamicCache, StaticCache) and not cache.offloading)


def _has_rotation(module: Any, layout: AttentionLayout, kwargs: dict[str, Any]) -> bool:
    if not layout.rotates:
        return True
    if layout.unrotated is not None and kwargs.get(layout.unrotated) is not None:
        return kwargs.get("attention_mask") is not None
    size = getattr(module, layout.head_dim)
    if layout.positions is not None:
        return kwargs.get("position_ids") is not None and getattr(module, layout.positions).shape[1] <= size
    tables = kwargs.get("position_embeddings")
    if not isinstance(tables, tuple) or len(tables) != 2 or tables[0].dim() != 3:
        return False
    return bool(tables[0].shape[-1] * layout.features_per_column <= size)


def _kv_heads(module: Any, layout: AttentionLayout) -> int:
    """How many keys the projections give; a single one gives as many values and all queries besides."""
    size = getattr(module, layout.head_dim)
    if isinstance(layout.projections, str):
        heads = module._modules[layout.projections].out_features // size
        return int(heads - _heads(module, layout)) // 2
    return int(module._modules[layout.projections[1]].out_features // size)


def _heads(module: Any, layout: AttentionLayout) -> int:
    """How many queries the projections give."""
    return int(module.config.num_attention_heads if layout.heads is None else getattr(module, layout.heads))


def _rotation(module: Any, layout: AttentionLayout, kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    if not layout.rotates or (layout.unrotated is not None and kwargs.get(layout.unrotated) is not None):
        return None, None
    if layout.positions is not None:
        sin, cos = getattr(module, layout.positions)[kwargs["position_ids"]].chunk(2, dim=-1)
        return cos, sin
    first, second = kwargs["position_embeddings"]
    return (second, first) if layout.sines_first else (first, second)


def _rotate(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The rotated query `[batch, tokens, heads, size]`, and key and value with heads before tokens."""
    keys, values = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (key, value))
    length = torch.zeros(1, dtype=torch.int64)
    query = call(
        torch.ops.torch_int4.rotary_append.default,
        query,
        key,
        value,
        cos,
        sin,
        keys,
        values,
        None,
        None,
        length,
        **options,
    )
    return query, keys, values


def _normed(module: Any, norm: str, heads: Tensor) -> Tensor:
    """Heads `[batch, tokens, heads, head size]` after the norm of that name."""
    layout = module.torch_int4_data.layout
    if layout.norms_heads_first:
        normed: Tensor = getattr(module, norm)(heads.transpose(1, 2)).transpose(1, 2)
        return normed
    if not layout.norms_all_heads:
        return getattr(module, norm)(heads)
    return getattr(module, norm)(heads.flatten(2)).view(heads.shape)


def _scale(module: Any, layout: AttentionLayout) -> float:
    if layout.scale is None:
        return float(getattr(module, layout.head_dim) ** -0.5)
    return float(getattr(module, layout.scale))


def _softcap(module: Any, layout: AttentionLayout) -> float:
    return 0.0 if layout.softcap is None else float(getattr(module, layout.softcap) or 0.0)
