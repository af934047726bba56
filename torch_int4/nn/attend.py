"""The attention operator on what a cache of transformers hands out, the masks that it takes, and biases in them.

Biases such as those of ALiBi are added to the scores beside the mask: one mask of both is made for all layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from torch_int4.ops.calls import call

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# The sum by the mask that it was made of, with the bias: all layers of a model are given the same ones, and it is as
# large as the scores. It goes as the mask does.
_made: Any = WeakIdKeyDictionary()


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


def is_bias(bias: Any, mask: Any, heads: int, hides: bool) -> bool:
    """Whether `biased` takes these.

    Args:
        bias: `[heads or batch * heads, 1, keys or more]`, of a float type.
        mask: `[batch or 1, 1, tokens or 1, keys]`; bool if `hides`.
        heads: of queries.
        hides: whether the mask is True where a key is hidden.
    """
    if not isinstance(bias, Tensor) or bias.dim() != 3 or not bias.is_floating_point() or not isinstance(mask, Tensor):
        return False
    count, ones, keys = bias.shape
    alike = ones == 1 and count in (heads, mask.shape[0] * heads) and keys >= mask.shape[-1]
    return alike and (not hides or mask.dtype == torch.bool)


def biased(mask: Tensor, bias: Tensor, heads: int, *, hides: bool) -> Tensor:
    """The mask that is added to scores, `[batch or 1, heads, tokens or 1, keys]`; arguments are those of `is_bias`."""
    if torch.compiler.is_compiling():
        return _sum(mask, bias, heads, hides)
    versions = _version(mask), _version(bias)
    made = _made.get(mask)
    if made is None or made[0] is not bias or made[1] != versions:
        _made[mask] = made = (bias, versions, _sum(mask, bias, heads, hides))
    total: Tensor = made[2]
    return total


def _sum(mask: Tensor, bias: Tensor, heads: int, hides: bool) -> Tensor:
    bias = bias[..., bias.shape[-1] - mask.shape[-1] :].unflatten(0, (-1, heads))
    if mask.dtype != torch.bool:
        return mask + bias
    return bias.masked_fill(mask if hides else ~mask, torch.finfo(bias.dtype).min)


def _version(x: Tensor) -> int:
    """Counts writes to x; tensors of inference mode have no counter."""
    return -1 if x.is_inference() else x._version
