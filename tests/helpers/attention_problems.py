"""Arguments of rotary_append and attention, and what tests of both ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CACHES = [*FLOATS, torch.int8]


def states(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache(batch: int, heads: int, keys: int, dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor | None]:
    """Keys or values of a type, and the scales of int8."""
    x = states(batch, heads, keys, dim, seed=seed)
    if dtype != torch.int8:
        return x.to(dtype), None
    scales = x.abs().amax(-1) / 127
    return (x / scales[..., None]).round().to(torch.int8), scales


def problem(
    batch: int = 1,
    tokens: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    keys: int = 129,
    *,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    key, key_scales = cache(batch, kv_heads, keys, dim, cache_dtype, 1)
    value, value_scales = cache(batch, kv_heads, keys, value_dim or dim, cache_dtype, 2)
    return {
        "query": states(batch, tokens, heads, dim, dtype=dtype), "key": key, "value": value,
        "key_scales": key_scales, "value_scales": value_scales, "length": None, "mask": None, "alibi_slopes": None,
        "scale": dim**-0.5, "causal": True,
    }  # fmt: skip


def append_problem(
    batch: int = 2,
    tokens: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    *,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.float32,
    length: int = 5,
    capacity: int = 16,
    rotary_dim: int | None = None,
    angle_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    value_dim = value_dim or dim
    rotary_dim = dim if rotary_dim is None else rotary_dim
    angles = states(batch, tokens, max(rotary_dim // 2, 1), seed=5) * 10
    full = torch.cat((angles, angles), -1)

    def empty(size: int) -> Tensor:
        return torch.full((batch, kv_heads, capacity, size), 77).to(cache_dtype)

    scales = [torch.full((batch, kv_heads, capacity), 77.0) if cache_dtype == torch.int8 else None for _ in range(2)]
    return {
        "query": states(batch, tokens, heads, dim, dtype=dtype, seed=1),
        "key": states(batch, tokens, kv_heads, dim, dtype=dtype, seed=2),
        "value": states(batch, tokens, kv_heads, value_dim, dtype=dtype, seed=3),
        "cos": full.cos().to(angle_dtype) if rotary_dim else None,
        "sin": full.sin().to(angle_dtype) if rotary_dim else None,
        "key_cache": empty(dim), "value_cache": empty(value_dim), "key_scales": scales[0], "value_scales": scales[1],
        "length": torch.tensor([length]), "rotary_dim": rotary_dim,
    }  # fmt: skip


def refuses(operator: Any, arguments: dict[str, Any], message: str, **changes: object) -> None:
    with pytest.raises(RuntimeError, match=message):
        operator(**{**arguments, **changes})
