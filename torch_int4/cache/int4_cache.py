"""The managed KV cache: pre-allocated, written in place, one token per step, in 16 or 8 bits.

It is a `transformers.Cache`, so that `generate` and everything around it works. Fused attention modules write it with
`append` and read it in `attend`; stock modules call `update`, as they do with any other cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from torch_int4.cache.storage import KVStorage
from torch_int4.config import KV_CACHES
from torch_int4.errors import Int4Error
from torch_int4.ops.calls import call


class Int4CacheLayer(KVStorage):
    """Keys and values of one attention layer, which both fused and stock attention modules may write and read."""

    is_sliding = False  # the masks of sliding layers leave out what is too old; nothing is dropped
    is_croppable = True

    def __init__(self, dtype: str = "auto", max_length: int | None = None, capacity: int = 0) -> None:
        if dtype not in KV_CACHES:
            raise Int4Error(f"dtype of the KV cache must be one of {', '.join(map(repr, KV_CACHES))}; got {dtype!r}")
        if max_length is not None and max_length < 1:
            raise Int4Error(f"max_length of the KV cache must be at least 1 token; got {max_length}")
        super().__init__(dtype, max_length, capacity)

    # Called by fused attention

    def append(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *,
        interleaved: bool = False,
        rotary_dim: int = 0,
    ) -> Tensor:
        """Rotates query and key, writes key and value at the end, and returns the query.

        Args:
            query: `[batch, tokens, heads, head size]`, as are key and value with their own number of heads.
            cos: `[batch or 1, tokens, rotary_dim or half of it]`, and so is sin; None for no rotation.
            interleaved: pairs of neighbours are rotated, not halves.
            rotary_dim: how many leading features are rotated.

        Raises:
            RuntimeError: a cache of fixed size is full.
        """
        if not self.is_initialized:
            self._allocate(key.transpose(1, 2), value.transpose(1, 2), self._resolve(key.dtype))
        tokens = key.shape[1]
        self._make_room(tokens)
        query = call(
            torch.ops.torch_int4.rotary_append.default,
            query,
            key,
            value,
            cos,
            sin,
            self.stored_keys,
            self.stored_values,
            self.key_scales,
            self.value_scales,
            self.length,
            rotary_dim=rotary_dim,
            interleaved=interleaved,
        )
        self.advance(tokens)
        return query

    def reserve(self, x: Tensor, kv_heads: int, head_size: int) -> None:
        """Makes room for keys and values of x `[batch, tokens, features]`, which an operator then appends."""
        if not self.is_initialized:
            states = x.new_empty(1).expand(x.shape[0], kv_heads, x.shape[1], head_size)
            self._allocate(states, states, self._resolve(x.dtype))
        self._make_room(x.shape[1])

    def advance(self, tokens: int) -> None:
        """Counts tokens that an operator has appended."""
        if self.max_length is None:
            self._count += tokens

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the last tokens to all in the cache; causal where there is no mask.

        Args:
            query: `[batch, tokens, heads, head size]`; the result has the same shape.
            mask: bool (True attends) or float (added), `[batch or 1, heads or 1, tokens or 1, >= length]`, or None.
        """
        output: Tensor = call(
            torch.ops.torch_int4.attention.default,
            query,
            self.stored_keys,
            self.stored_values,
            self.key_scales,
            self.value_scales,
            self.length,
            mask,
            None,
            scale=scale,
            causal=mask is None,
            softcap=softcap,
            sinks=sinks,
        )
        return output

    def holds(self, kv_heads: int) -> bool:
        """Whether keys with this many heads can be appended."""
        return self.stored_keys is None or self.stored_keys.shape[1] == kv_heads

    # Called by transformers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates for states `[batch, kv heads, any, head size]`."""
        self._allocate(key_states, value_states, self._resolve(key_states.dtype))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends states `[batch, kv heads, tokens, head size]` and returns all of them, in their dtype.

        Copies nothing but the new tokens where the cache stores that dtype, as "auto" does here. Callers that repeat
        the same kv head for several query heads get as many back.
        """
        if not self.is_initialized:  # what is handed back all the time is best stored as it is
            own = key_states.dtype if self.kind == "auto" else self._resolve(key_states.dtype)
            self._allocate(key_states, value_states, own)
        assert self.stored_keys is not None
        repeats = max(key_states.shape[1] // self.stored_keys.shape[1], 1)
        states = (key_states[:, ::repeats], value_states[:, ::repeats])
        past = None
        if torch.is_grad_enabled():  # gradients flow through what is new, and later writes must not harm them
            start = self.length.clone()
            past = self._read(key_states.dtype)
        self._write(*states)
        if past is None:
            keys, values = self._read(key_states.dtype)
        elif self.max_length is None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(past, states, strict=True))
        else:
            at = torch.arange(states[0].shape[2]) + start
            keys, values = (old.index_copy(2, at, new) for old, new in zip(past, states, strict=True))
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
        return keys, values

    def get_seq_length(self) -> Any:
        """Tokens in the cache; a tensor where the size is fixed, so that compiled code is the same for each step."""
        if not self.is_initialized:
            return 0
        return self._count if self.max_length is None else self.length[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of a mask for so many new tokens, and the position of the first."""
        return (self._count + query_length if self.max_length is None else self.max_length), 0

    def get_max_length(self) -> int:
        """Tokens that fit, -1 without a limit."""
        return -1 if self.max_length is None else self.max_length

    def reset(self) -> None:
        """Empties the cache and keeps its memory."""
        self._count = 0
        self.length.zero_()
        if self.max_length is not None and self.stored_keys is not None:
            for tensor in self._tensors().values():  # stock modules read beyond the length
                tensor.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise Int4Error(
                f"crop takes the negative number of tokens to remove, as all caches do; got {tokens_to_remove}"
            )
        self._count = max(self._count + tokens_to_remove, 0)
        if self.max_length is None:  # of every layer, after every step of guessed tokens
            self.length.fill_(self._count)
        else:
            self.length.add_(tokens_to_remove).clamp_(min=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; only rows that change are copied."""
        if not self.is_initialized:
            return
        rows = torch.nonzero(beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).flatten()
        if len(rows):
            used = slice(self._count if self.max_length is None else None)
            for tensor in self._tensors().values():
                tensor[rows, :, used] = tensor[beam_idx[rows], :, used]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        if self.stored_keys is not None:
            self._select(torch.arange(self.stored_keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows of the batch."""
        if self.stored_keys is not None:
            rows = indices if indices.dtype == torch.bool else indices.to(torch.int64)
            self._select(torch.arange(self.stored_keys.shape[0])[rows])

    def _write(self, keys: Tensor, values: Tensor) -> None:
        with torch.no_grad():
            moved = [_operand(states) for states in (keys, values)]
            self.append(moved[0], *moved)


class Int4Cache(Cache):
    """The KV cache of a model, one `Int4CacheLayer` for each of its layers.

    Args:
        config: of the model; without it layers are made as they are first used.
        dtype: what is stored: "fp32", "bf16", "fp16", "int8" with a scale per token and head, or "auto": 16 bits.
        max_length: tokens that the cache ever holds. It is then allocated once and never grows, which is what
            `torch.compile` wants; without it the cache grows.
        capacity: tokens to allocate at first, where it grows.
    """

    def __init__(
        self, config: Any = None, *, dtype: str = "auto", max_length: int | None = None, capacity: int = 0
    ) -> None:
        make = functools.partial(Int4CacheLayer, dtype=dtype, max_length=max_length, capacity=capacity)
        first = make()  # bad arguments are refused here and not in the first forward
        if config is None:
            super().__init__(layer_class_to_replicate=make)
        else:
            count = config.get_text_config(decoder=True).num_hidden_layers
            super().__init__(layers=[first, *(make() for _ in range(count - 1))])

    @property
    def max_cache_len(self) -> int:
        """Tokens that fit, -1 without a limit; by the name that PEFT asks for."""
        return self.layers[0].get_max_length() if self.layers else -1

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, None]]:
        """(keys, values, None) of every layer, as a `DynamicCache` gives them."""
        for layer in self.layers:
            yield layer.keys, layer.values, None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for layer in self.layers for t in layer._tensors().values())

    def layer(self, index: int) -> Int4CacheLayer:
        """The layer of that index, made if it is not there yet."""
        while self.layer_class_to_replicate is not None and len(self.layers) <= index:
            self.layers.append(self.layer_class_to_replicate())
        return self.layers[index]


def _operand(states: Tensor) -> Tensor:
    """States `[batch, heads, tokens, size]` as the operators take them, with tokens before heads."""
    if states.dtype == torch.float64:
        states = states.float()
    states = states.transpose(1, 2)
    return states if states.stride(-1) == 1 else states.contiguous()
