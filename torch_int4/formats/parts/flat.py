"""Blocks of a weight that was flattened first: they ignore rows, so that one may end in the middle of a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_int4.errors import Int4Error


def group_size(inputs: int, block: int, name: str) -> int:
    """Inputs per group of a row such that a group never spans two blocks; -1 for a whole row.

    Raises:
        Int4Error: rows and blocks share no multiple of 32 inputs.
    """
    size = math.gcd(inputs, block)
    if size == inputs:
        return -1
    if size % 32:
        raise Int4Error(
            f"{name}: blocks of {block} values cross its rows of {inputs} inputs, which is not served; "
            "load the float model and patch() that"
        )
    return size


def per_group(values: Tensor, shape: tuple[int, int], block: int, size: int) -> Tensor:
    """One value per block, `[blocks]`, as one per group `[N, K / size]`."""
    rows, inputs = shape
    size = inputs if size == -1 else size
    starts = torch.arange(0, rows * inputs, size)
    return values.reshape(-1)[starts // block].view(rows, inputs // size)


def count(shape: tuple[int, int], block: int) -> int:
    """Blocks of a weight, the last of which may be shorter."""
    return -(-shape[0] * shape[1] // block)
