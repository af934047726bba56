"""HQQ: half-quadratic quantization, a rounding without data whose offsets fit weights with heavy tails.

From Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). Of |w - w'|^p with p < 1,
which large errors dominate less than they do a square, the minimum over the offset is found by turns: the error that
remains is shrunk (a generalised soft threshold), and the offset becomes the mean that fits what is left. Scales stay
as the range gives them; offsets are floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_int4.config import WeightOptions
from torch_int4.errors import Int4Error
from torch_int4.recipes import rtn
from torch_int4.recipes.gptq import grid_of
from torch_int4.recipes.parts.block import Inputs
from torch_int4.recipes.parts.grid import Grid, round_fp16
from torch_int4.weights.canonical import Int4Weight, group_spans

NORM = 0.7
BETA, GROWTH = 10.0, 1.01
ITERATIONS = 20


def check(options: WeightOptions) -> None:
    """Raise Int4Error where offsets are not floats."""
    if options.symmetric or options.zeros != "float":
        raise Int4Error("Int4Config.recipe='hqq' finds float offsets: give symmetric=False, zeros='float' with it")


def quantize(
    weight: Tensor, options: WeightOptions, *, bits: int = 4, name: str = "weight", inputs: Inputs | None = None
) -> Int4Weight:
    """Quantize `weight` `[N, K]`; statistics of inputs are not used. 8 bits are rounded to nearest.

    Raises:
        Int4Error: what `rtn` refuses.
    """
    start = rtn.quantize(weight, options, bits=bits, name=name)
    if bits == 8:
        return start
    s, z = grid_of(start)
    grid, dense = Grid("float"), weight.detach().float()
    codes = torch.empty_like(start.codes)
    for columns, groups, length in group_spans(weight.shape[1], options.group_size):
        w = dense[:, columns].reshape(-1, length)
        scale = s[:, groups].reshape(-1, 1)
        zero = _solve(w, scale, z[:, groups].reshape(-1, 1), grid)
        z[:, groups] = zero.view(z[:, groups].shape)
        codes[:, columns] = grid.encode(w, scale, zero).to(torch.uint8).view(len(dense), -1)
    return rtn.pack_up(codes, s, z, grid, options.group_size, name)


def _solve(w: Tensor, s: Tensor, start: Tensor, grid: Grid) -> Tensor:
    """Offsets `[n, 1]` of the groups `w` `[n, length]`: per group the best of all that the iterations pass through."""
    step = torch.where(s == 0, 1.0, s)
    z, best = start, start.clone()
    least = _distance(grid.difference(w, s, z), step)
    beta = BETA
    for _ in range(ITERATIONS):
        codes = grid.encode(w, s, z)
        error = (w - (codes * s + z)) / step
        error = _shrink(error, beta) * step
        z = round_fp16((w - error - codes * s).mean(1, keepdim=True))
        z = torch.where(s == 0, start, z)
        distance = _distance(grid.difference(w, s, z), step)
        better = distance < least
        best, least = torch.where(better, z, best), torch.where(better, distance, least)
        beta *= GROWTH
    return best


def _shrink(x: Tensor, beta: float) -> Tensor:
    """The generalised soft threshold of the p-norm."""
    magnitude = x.abs()
    return x.sign() * (magnitude - magnitude.clamp(min=1e-8).pow(NORM - 1) / beta).clamp(min=0)


def _distance(difference: Tensor, step: Tensor) -> Tensor:
    return (difference / step).abs().clamp(min=1e-8).pow(NORM).sum(1, keepdim=True)
