"""Rounding the linears of a block by whichever function the rounding stage of a recipe has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from torch_int4.config import WeightOptions
from torch_int4.recipes import rtn
from torch_int4.recipes.parts.block import Block, Linear
from torch_int4.recipes.parts.recipe import Recipe
from torch_int4.weights.canonical import Int4Weight
from torch_int4.weights.result import Result


def round_block(recipe: Recipe, block: Block, options: WeightOptions) -> dict[str, Result]:
    """Round the linears of a block: 8-bit ones to nearest, the others by the recipe; those with one input at once.

    Raises:
        Int4Error: what the stage refuses, or its results are none of these linears'.
    """
    found: dict[str, Result] = {}
    if recipe.by_block:
        found.update({name: Result.of(one) for name, one in recipe.rounding.round(block, options).items()})
    else:
        found.update(round_by_weight(recipe.rounding, [one for one in block.linears if one.bits == 4], options))
    found.update(round_by_weight(rtn, [linear for linear in block.linears if linear.name not in found], options))
    return {one.name: recipe.checked(found[one.name], one.weight.shape, one.name) for one in block.linears}


def round_by_weight(stage: ModuleType, linears: Iterable[Linear], options: WeightOptions) -> dict[str, Result]:
    """The results of `stage.round`, of a stage that has `quantize`: linears with one input are rounded as one.

    Where results may have extras every linear is by itself, for extras belong to a linear as a whole.
    """
    found = {}
    for group in _groups(linears, apart=hasattr(stage, "EXTRAS")):
        given = {"inputs": group[0].inputs} if group[0].bits == 4 else {}
        weight = group[0].weight if len(group) == 1 else torch.cat([linear.weight for linear in group])
        rounded = stage.quantize(weight, options, bits=group[0].bits, name=group[0].name, **given)
        if len(group) == 1 and isinstance(rounded, Result):
            found[group[0].name] = rounded
            continue
        start = 0
        for linear in group:
            rows = slice(start, start + linear.weight.shape[0])
            found[linear.name] = Result(_rows(rounded, rows))
            start = rows.stop
    return found


def _groups(linears: Iterable[Linear], *, apart: bool) -> list[list[Linear]]:
    """Linears that can be rounded as one: the same input and bits. Without statistics each is on its own."""
    groups: dict[Any, list[Linear]] = {}
    for linear in linears:
        alone = apart or linear.inputs is None
        groups.setdefault(id(linear) if alone else (id(linear.inputs), linear.bits), []).append(linear)
    return list(groups.values())


def _rows(weight: Int4Weight, rows: slice) -> Int4Weight:
    return replace(
        weight,
        codes=weight.codes[rows].contiguous(),
        scales=weight.scales[rows].contiguous(),
        zeros=None if weight.zeros is None else weight.zeros[rows].contiguous(),
        offsets=None if weight.offsets is None else weight.offsets[rows].contiguous(),
    )
