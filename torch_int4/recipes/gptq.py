"""GPTQ: weights are rounded one input at a time, and what is lost is made up for by the inputs that follow.

From arXiv 2210.17323: with H = Σ x xᵀ of the calibration inputs and U the upper Cholesky factor of its inverse, the
rounding error of input j, divided by U[j, j], times the row U[j] is taken off the inputs behind it. Blocks of 128
inputs are finished before the rest of the matrix is touched. All rows are worked on at once.

Inputs are taken in the order of falling diag(H) ("act-order"), while every group keeps the grid that it has from the
start, so that nothing has to be permuted when the weight is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_int4.config import WeightOptions
from torch_int4.errors import Int4Error
from torch_int4.recipes import rtn
from torch_int4.recipes.parts.block import Inputs
from torch_int4.recipes.parts.grid import Grid
from torch_int4.weights.canonical import Int4Weight

NEEDS_INPUTS = True
DAMPING = 0.01  # share of the mean of diag(H) that is added to it
COLUMNS = 128
DOUBLE = 4096  # up to so many inputs the inverse is computed in fp64, beyond only where fp32 does not do


def quantize(
    weight: Tensor, options: WeightOptions, *, bits: int = 4, name: str = "weight", inputs: Inputs | None = None
) -> Int4Weight:
    """Quantize `weight` `[N, K]` for inputs with the given statistics.

    Raises:
        Int4Error: naming `name`: what `rtn` refuses, statistics that are missing, of another width or not finite.
    """
    start = rtn.quantize(weight, options, bits=bits, name=name, inputs=inputs)
    if inputs is None or inputs.gram.shape[0] != weight.shape[1]:
        raise Int4Error(f"{name}: GPTQ needs the statistics of its {weight.shape[1]} inputs; give calibration data")
    order, factor = inverse_factor(inputs, name)
    grid = Grid("symmetric" if options.symmetric or bits == 8 else options.zeros, bits)
    s, z = grid_of(start)
    size = weight.shape[1] if options.group_size == -1 else options.group_size
    group = (order // size).tolist()
    # Transposed: an input's weights of all outputs lie side by side.
    w = weight.detach().float().t()[order].contiguous()
    codes = _round_columns(w, s.t().contiguous(), z.t().contiguous(), group, factor, grid)
    start.codes.t()[order] = codes
    return start


def grid_of(weight: Int4Weight) -> tuple[Tensor, Tensor]:
    """Scales and zeros (points or minima), fp32 `[N, G]`, as `Grid` takes them."""
    s = weight.scales.float()
    if weight.offsets is not None:
        return s, weight.offsets.float()
    return s, torch.full_like(s, 1 << (weight.bits - 1)) if weight.zeros is None else weight.zeros.float()


def _round_columns(w: Tensor, s: Tensor, z: Tensor, group: list[int], factor: Tensor, grid: Grid) -> Tensor:
    """Codes uint8 `[K, N]` of `w` `[K, N]`, which is overwritten; `s` and `z` are `[G, N]`, `factor` is U."""
    codes = torch.empty(w.shape, dtype=torch.uint8)
    diagonal = factor.diagonal().tolist()
    for first in range(0, len(w), COLUMNS):
        last = min(first + COLUMNS, len(w))
        errors = torch.empty(last - first, w.shape[1])
        for k in range(first, last):
            scale, zero = s[group[k]], z[group[k]]
            q = grid.encode(w[k], scale, zero)
            codes[k] = q.to(torch.uint8)
            error = torch.sub(w[k], grid.decode(q, scale, zero), out=errors[k - first]).div_(diagonal[k])
            w[k + 1 : last].addr_(factor[k, k + 1 : last], error, alpha=-1)
        w[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    return codes


def inverse_factor(inputs: Inputs, name: str) -> tuple[Tensor, Tensor]:
    """The order of the inputs `[K]`, and the upper Cholesky factor of the damped inverse of H in that order, fp32.

    Inputs that were always zero keep a one on the diagonal: they are rounded to nearest.
    """
    if "gptq" not in inputs.cache:
        inputs.cache["gptq"] = _inverse_factor(inputs.gram, name)
    return inputs.cache["gptq"]  # type: ignore[return-value]


def _inverse_factor(gram: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not bool(torch.isfinite(gram).all()):
        raise Int4Error(f"{name}: its inputs hold NaN or infinity on the calibration data")
    diagonal = gram.diagonal().double()
    dead = diagonal <= 0
    order = diagonal.argsort(descending=True, stable=True)
    mean = diagonal[~dead].mean().item() if bool((~dead).any()) else 1.0
    h = gram[order][:, order].double() / mean
    h.diagonal()[dead[order]] = 1.0
    damping = DAMPING
    while damping < 1e6:
        damped = h.clone()
        damped.diagonal().add_(damping)
        dtypes = (torch.float64,) if len(h) <= DOUBLE else (torch.float32, torch.float64)
        for dtype in dtypes:
            factor = _upper_of_inverse(damped.to(dtype))
            if factor is not None:
                return order, factor.float().contiguous()
        damping *= 10
    raise Int4Error(f"{name}: the statistics of its inputs are not a Gram matrix")


def _upper_of_inverse(h: Tensor) -> Tensor | None:
    """Upper factor U with UᵀU = h⁻¹, or None where h is not positive definite in its precision."""
    lower, info = torch.linalg.cholesky_ex(h)
    if int(info):
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    usable = not int(info) and bool(torch.isfinite(upper).all())
    return upper if usable else None
