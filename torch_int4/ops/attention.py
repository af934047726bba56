"""The operators `torch_int4::rotary_append` and `torch_int4::attention`: shapes for `torch.compile`, and gradients.

`rotary_append(query, key, value, cos, sin, key_cache, value_cache, key_scales, value_scales, length, *, rotary_dim=0,
interleaved=False) -> Tensor` rotates queries `[B, T, H, D]` and keys `[B, T, Hkv, D]` (RoPE, arXiv:2104.09864), writes
the keys and the values `[B, T, Hkv, Dv]` into the caches `[B, Hkv, capacity, D or Dv]` at tokens `length` ..
`length + T - 1`, adds T to `length` (int64 `[1]`), and returns the rotated queries. `cos` and `sin` are
`[B or 1, T, rotary_dim or rotary_dim / 2]`, of which the first `rotary_dim / 2` columns are read; `interleaved` turns
pairs (2j, 2j+1) instead of (j, j + rotary_dim/2). Caches are float32, bfloat16, float16 (clamped to its range) or int8
with float32 scales `[B, Hkv, capacity]`, absmax / 127 of each token and head. Raises `RuntimeError`, before anything is
written, where the tokens do not fit.

`attention(query, key, value, key_scales, value_scales, length, mask, alibi_slopes, *, scale, causal, window=0,
softcap=0.0) -> Tensor` attends from queries `[B, T, H, D]` to keys `[B, Hkv, S, D]` and values `[B, Hkv, S, Dv]` of
those types; query head h reads head h // (H / Hkv). Of the S keys the first `length` (all, if None) are valid, and
query t stands at position `length` - T + t. `causal` hides keys behind that position, `window` > 0 those at or before
it minus `window`, `mask` (`[B or 1, H or 1, T or 1, >= length]`) those that are False, -inf or the lowest number of
its type; other floats are added. A score is `softcap * tanh(q.k * scale / softcap)` (if `softcap` > 0), plus the
mask, plus `alibi_slopes` (`[H]` or `[B, H]`) times the index of the key (arXiv:2108.12409). Arithmetic is float32, by
the online softmax of FlashAttention (arXiv:2205.14135). A row that sees no key is zeros. Returns `[B, T, H, Dv]` of
query's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.ops.fakes import fake


@fake("rotary_append")
def _rotary_append(query: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@fake("attention")
def _attention(query: Tensor, value: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _no_gradient(ctx: Any, *grads: Any) -> None:
    raise Int4Error("attention is for inference; use the model's own attention where gradients are needed")


# rotary_append writes into its arguments, so PyTorch takes no formula for it; gradients stop here before they reach it.
torch.library.register_autograd("torch_int4::attention", _no_gradient)
