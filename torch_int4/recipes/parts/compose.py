"""Rounding the linears of a block by whichever kind of stage a recipe has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from torch_int4.config import WeightOptions
from torch_int4.recipes import Recipe, rtn
from torch_int4.recipes.parts.block import Block, Linear
from torch_int4.weights.canonical import Int4Weight


def quantize_block(recipe: Recipe, block: Block, options: WeightOptions) -> dict[str, Int4Weight]:
    """Round the linears of a block: 8-bit ones to nearest, the others by the recipe; those with one input at once."""
    found = {}
    if recipe.by_block:
        found.update(recipe.rounding.quantize_block(block, options))
    for group in _groups(linear for linear in block.linears if linear.name not in found):
        stage = recipe.rounding if group[0].bits == 4 and not recipe.by_block else rtn
        extra = {"inputs": group[0].inputs} if group[0].bits == 4 else {}
        weight = group[0].weight if len(group) == 1 else torch.cat([linear.weight for linear in group])
        rounded = stage.quantize(weight, options, bits=group[0].bits, name=group[0].name, **extra)
        start = 0
        for linear in group:
            rows = slice(start, start + linear.weight.shape[0])
            found[linear.name] = _rows(rounded, rows)
            start = rows.stop
    return {linear.name: found[linear.name] for linear in block.linears}


def _groups(linears: Iterable[Linear]) -> list[list[Linear]]:
    """Linears that can be rounded as one: the same input and bits. Without statistics each is on its own."""
    groups: dict[Any, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(id(linear) if linear.inputs is None else (id(linear.inputs), linear.bits), []).append(linear)
    return list(groups.values())


def _rows(weight: Int4Weight, rows: slice) -> Int4Weight:
    return Int4Weight(
        weight.codes[rows].contiguous(),
        weight.scales[rows].contiguous(),
        None if weight.zeros is None else weight.zeros[rows].contiguous(),
        None if weight.offsets is None else weight.offsets[rows].contiguous(),
        weight.perm,
        weight.group_size,
        weight.bits,
    )
