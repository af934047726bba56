"""AWQ: inputs that are large on average get finer weights, by scales that are folded into the module before.

From arXiv 2306.00978: s = mean|x|^a, normalised, with a between 0 and 1 chosen by the error that rounding the scaled
weights makes. That error, the squared distance of the linears' products, is read off the Gram matrix of the inputs:
no block is run again. By itself the name also means the clip search of the paper, after which weights are rounded to
nearest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_int4.config import WeightOptions
from torch_int4.recipes import rtn
from torch_int4.recipes.parts.block import Block, Linear
from torch_int4.recipes.parts.folds import Fold

NEEDS_INPUTS = True
ALONE: tuple[str, dict[str, Any]] = ("awq+rtn", {"clip": True})
STEPS = 20  # exponents that are tried, besides 0
ROWS = 256  # about so many rows of each weight are rounded in the search, spread over all of them
LEAST = 1e-4  # of a mean, relative to their largest: scales stay finite


def transform(block: Block, options: WeightOptions) -> None:
    """Fold the best scales into every pair of modules that allows it; the search rounds without clipping."""
    options = replace(options, clip=False)
    for fold in block.folds:
        linears = [linear for target in fold.targets if (linear := block.linear_of(target)) is not None]
        linears = [linear for linear in linears if linear.inputs is not None and linear.inputs.rows > 0]
        if linears:
            s = search(fold, linears, options)
            if s is not None:
                block.fold(fold, s)


def search(fold: Fold, linears: list[Linear], options: WeightOptions) -> Tensor | None:
    """The scales `[channels]` with the least error, None where no scales are best."""
    inputs = linears[0].inputs
    assert inputs is not None
    mean = fold.reduce(inputs.mean_abs, "mean")
    mean = mean.clamp(min=LEAST * mean.max().item())
    if not bool(torch.isfinite(mean).all()) or mean.max() <= 0:
        return None
    best, least = None, _error(linears, None, options)
    for step in range(1, STEPS + 1):
        s = normalise(mean ** (step / STEPS))
        error = _error(linears, fold.expand(s), options)
        if error < least:
            best, least = s, error
    return best


def normalise(s: Tensor) -> Tensor:
    """Scales whose smallest and largest are each other's inverse."""
    return s / (s.max() * s.min()).sqrt()


def _error(linears: list[Linear], wide: Tensor | None, options: WeightOptions) -> float:
    """Squared error of the linears' products when their weights are rounded after scaling by `wide` `[K]`."""
    total = 0.0
    for linear in linears:
        assert linear.inputs is not None
        weight = linear.weight[:: -(-linear.weight.shape[0] // ROWS)].float()
        scaled = weight if wide is None else weight * wide
        rounded = rtn.quantize(scaled, options, bits=linear.bits, name=linear.name).dequantize()
        difference = (rounded if wide is None else rounded / wide) - weight
        total += linear.inputs.error(difference).sum().item()
    return total
