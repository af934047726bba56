"""Linears and parameters that a model uses in several places, and linears that run several times."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from torch_int4.recipes.parts.block import Inputs, Linear


def places_of(named: Iterable[tuple[str, Any]], blocks: Sequence[str]) -> dict[int, set[str]]:
    """The blocks that hold each module or parameter, by its `id`; "" stands for all that is outside of blocks."""
    known = set(blocks)
    depth = blocks[0].count(".") + 1
    where: dict[int, set[str]] = defaultdict(set)
    for name, found in named:
        block = ".".join(name.split(".")[:depth])
        where[id(found)].add(block if block in known else "")
    return where


def count(linears: Sequence[Linear], seen: Sequence[Sequence[Tensor]]) -> None:
    """Count what linears were given in a batch, once for those that have been given the same tensors in all batches."""
    parts: dict[Any, list[int]] = {}
    for place, (linear, inputs) in enumerate(zip(linears, seen, strict=True)):
        if inputs:
            parts.setdefault((id(linear.inputs), *map(id, inputs)), []).append(place)
    for places in parts.values():
        counted = linears[places[0]].inputs
        if counted is None:
            counted = Inputs(seen[places[0]][0].shape[-1])
        elif sum(linear.inputs is counted for linear in linears) > len(places):  # others go on without this batch
            counted = copy.deepcopy(counted)
        for x in seen[places[0]]:
            counted.add(x)
        for place in places:
            linears[place].inputs = counted
