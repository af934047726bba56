"""The attention operator on what a cache of transformers hands out, and the masks that it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.ops.calls import call

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over the keys that a cache of transformers hands out, `[batch, tokens, heads, value head size]`.

    Args:
        query: `[batch, tokens, heads, head size]`, of a float type.
        key: `[batch, kv heads, keys, head size]`.
        value: `[batch, kv heads, keys, value head size]`.
        mask: `[batch or 1, heads or 1, tokens or 1, keys]`, bool (True attends) or float (added), or None.
        causal: whether several tokens without a mask see only the keys up to their own. A single token sees all keys.
        scale: factor of the scores.
        softcap: bound of the scores, by a tanh; 0 leaves them unbounded.
        sinks: `[heads]`, a score of each head that has no value, or None.
    """
    tokens = query.shape[1]
    causal = causal and mask is None and tokens > 1
    if causal and key.shape[2] > tokens:  # the first tokens in a cache of fixed size, whose other places are empty
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    output: Tensor = call(
        torch.ops.torch_int4.attention.default,
        query,
        key,
        value,
        None,
        None,
        None,
        mask,
        None,
        scale=scale,
        causal=causal,
        softcap=softcap,
        sinks=sinks,
    )
    return output


def is_mask(mask: Any) -> bool:
    """Whether the operators take this as a mask; None is one."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.dim() == 4 and (mask.dtype == torch.bool or mask.dtype in FLOATS)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True attends) as one that is added to scores of that dtype; others as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
