"""Biases that a model adds to the scores of attention beside its mask, such as those of ALiBi, as one mask of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# The sum by the mask that it was made of, with the bias: all layers of a model are given the same ones, and it is as
# large as the scores. It goes as the mask does.
_made: Any = WeakIdKeyDictionary()


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
