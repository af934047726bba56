"""Act-order: a file gives the group of each input, the canonical form a permutation that makes groups contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.weights.canonical import Int4Weight


def from_group_index(weight: Int4Weight, index: Tensor, name: str) -> None:
    """Order the columns of `weight` by their group, in place; `perm` stays None where they are ordered already.

    Args:
        weight: codes in the order of the inputs; scales and zeros per group, in the order of the groups.
        index: int32 or int64 [K], the group of each input.

    Raises:
        Int4Error: a group that does not exist, or groups of another size than declared.
    """
    inputs = weight.in_features
    if tuple(index.shape) != (inputs,):
        raise Int4Error(f"{name}: the group index must have shape [{inputs}], got {list(index.shape)}")
    groups = weight.groups
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        bad = low if low < 0 else high
        raise Int4Error(f"{name}: the group index holds {bad}, and there are {groups} groups")
    size = inputs if weight.group_size == -1 else weight.group_size
    expected = torch.full((groups,), size).clamp_max(inputs)
    expected[-1] = inputs - (groups - 1) * size
    if not torch.equal(torch.bincount(index.long(), minlength=groups), expected):
        raise Int4Error(
            f"{name}: the group index does not hold {size} inputs per group, which is not served. "
            "Quantize again without act-order, or with static groups"
        )
    perm = torch.argsort(index.long(), stable=True)
    if not torch.equal(perm, torch.arange(inputs)):
        weight.codes = weight.codes[:, perm].contiguous()
        weight.perm = perm


def to_group_index(weight: Int4Weight) -> tuple[Tensor, Tensor]:
    """(codes in the order of the inputs uint8 [N, K], group of each input int32 [K])."""
    size = weight.in_features if weight.group_size == -1 else weight.group_size
    index = (torch.arange(weight.in_features) // size).int()
    if weight.perm is None:
        return weight.codes, index
    codes, ordered = torch.empty_like(weight.codes), torch.empty_like(index)
    codes[:, weight.perm] = weight.codes
    ordered[weight.perm] = index
    return codes, ordered
