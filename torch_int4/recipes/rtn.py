"""Round to nearest: every weight takes the nearest point of its group's grid; no data is needed.

The grid of a group, where `extreme` is the signed weight of largest magnitude:

    ===================  =======================  =====================
    grid                 scale                    zero point or offset
    ===================  =======================  =====================
    symmetric, 4 bits    -extreme / 8             8
    symmetric, 8 bits    abs(extreme) / 127       128
    integer zero point   (greatest - least) / 15  round(-least / scale)
    float offset         (greatest - least) / 15  least
    ===================  =======================  =====================

With an integer zero point, zero is one of the weights between which least and greatest are found.

Codes are computed with the scale and offset as they are stored (fp16 where it loses nothing that matters).
Weights that already lie on such a grid, because they came out of a 4-bit file, are taken over exactly, also
where a group uses only some of its 16 codes.

The clip search takes, per group, the shrink factor with the least squared weight error (section 3.2 of arXiv
2311.00502 lists such recipes), or, with calibration, the least squared error of the products, from the Gram
matrix of the group's inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_int4.config import WeightOptions
from torch_int4.errors import Int4Error
from torch_int4.recipes.parts.block import Inputs
from torch_int4.recipes.parts.grid import Grid, is_fp16
from torch_int4.weights.canonical import Int4Weight, group_spans

CHUNK = 1 << 19  # weights per step: a few temporaries of it stay in the cache of a core
SAMPLE = 512  # groups that decide whether a weight is searched for an exact grid
CLIP_FACTORS = tuple(1.0 - 0.02 * step for step in range(21))
Measure = Callable[[Tensor], Tensor]


def quantize(
    weight: Tensor, options: WeightOptions, *, bits: int = 4, name: str = "weight", inputs: Inputs | None = None
) -> Int4Weight:
    """Quantize `weight`, `[N, K]` of any float dtype, to `bits` (4, or 8: always symmetric and without
    clipping). With `inputs`, the clip search minimises the error of the products instead of the weights'.

    Raises:
        Int4Error: naming `name`: not a finite, two-dimensional float weight with values, or its groups span
            more than fp32 holds.
    """
    weight = weight.detach()
    check_weight(weight, bits, name)
    grid = Grid("symmetric" if options.symmetric or bits == 8 else options.zeros, bits)
    rows, width = weight.shape
    size = options.group_size
    groups = 1 if size == -1 else -(-width // size)
    codes = torch.empty(rows, width, dtype=torch.uint8)
    scales = torch.empty(rows, groups)
    zeros = torch.empty_like(scales)

    exact = bits == 4 and _lies_on_grid(weight, size, grid)
    clip = options.clip and bits == 4
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        chunk = weight[part].float()
        for columns, span, length in group_spans(width, size):
            w = chunk[:, columns].reshape(-1, length)
            measure = weighted(inputs, columns, length) if clip and inputs is not None else squares
            q, s, z = _round_groups(w, grid, exact, measure if clip else None)
            codes[part, columns] = q.view(chunk.shape[0], -1)
            scales[part, span] = s.view(chunk.shape[0], -1)
            zeros[part, span] = z.view(chunk.shape[0], -1)
    return pack_up(codes, scales, zeros, grid, size, name)


def check_weight(weight: Tensor, bits: int, name: str) -> None:
    """Raise Int4Error, naming `name`, for what no recipe can quantize."""
    if bits not in (4, 8):
        raise Int4Error(f"{name}: recipes make 4 or 8 bits, not {bits!r}")
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise Int4Error(f"{name}: needs a float weight [N, K]; got {weight.dtype} {list(weight.shape)}")
    if weight.is_meta:
        raise Int4Error(f"{name}: is on the meta device and has no values; load the weights first")
    low, high = torch.aminmax(weight)
    if not (bool(torch.isfinite(low)) and bool(torch.isfinite(high))):
        raise Int4Error(f"{name}: holds NaN or infinity; check the checkpoint, or leave it out with Int4Config.skip")
    if max(abs(float(low)), abs(float(high))) > torch.finfo(torch.float32).max / 2:
        raise Int4Error(f"{name}: holds values near the end of fp32's range; leave it out with Int4Config.skip")


def squares(difference: Tensor) -> Tensor:
    """Squared error of weights, `[n, 1]`, for differences `[n, length]`, which are overwritten."""
    return difference.square_().sum(1, keepdim=True)


def weighted(inputs: Inputs, columns: slice, length: int) -> Measure:
    """Squared error of products with these inputs, each group of `length` inputs by itself."""
    gram = inputs.gram[columns, columns].unfold(0, length, length).unfold(1, length, length)
    gram = gram.diagonal(dim1=0, dim2=1).permute(2, 0, 1).contiguous()  # the blocks on the diagonal, one per group

    def measure(difference: Tensor) -> Tensor:
        parts = difference.view(-1, gram.shape[0], length).transpose(0, 1)
        return torch.bmm(parts, gram).mul_(parts).sum(2).t().reshape(-1, 1)

    return measure


def _round_groups(w: Tensor, grid: Grid, exact: bool, clip: Measure | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[n, length]`, scales and zeros (or offsets) `[n, 1]` of the groups `w` `[n, length]`."""
    bounds = grid.bounds(w)
    s, z = grid.fit(*bounds)
    if exact:
        _take_over(w, s, z, grid)
    if clip is not None:
        search_clip(w, bounds, s, z, grid, clip)
    return grid.encode(w, s, z).to(torch.uint8), s, z


def search_clip(
    w: Tensor, bounds: tuple[Tensor, Tensor], s: Tensor, z: Tensor, grid: Grid, measure: Measure = squares
) -> None:
    """Put into `s` and `z`, per group, the range shrunk by the factor with the least error."""
    least = measure(grid.difference(w, s, z))
    for factor in CLIP_FACTORS[1:]:
        new_s, new_z = grid.fit(*grid.shrink(w, bounds, factor))
        error = measure(grid.difference(w, new_s, new_z))
        better = error < least
        torch.where(better, error, least, out=least)
        torch.where(better, new_s, s, out=s)
        torch.where(better, new_z, z, out=z)


def _take_over(w: Tensor, s: Tensor, z: Tensor, grid: Grid) -> Tensor:
    """Put into `s` and `z` the grid that gives a group back exactly, wherever there is one in fp16.

    The ends of a group need not use the first and last code, so every number of steps between them is tried,
    and for float offsets every first code. Accepted only when each weight comes back bit by bit.

    Returns:
        bool `[n]`, the groups that come back exactly.
    """
    done = grid.matches(w, s, z)
    todo = (~done).nonzero().flatten()
    # A group with more values than codes lies on no grid: this leaves ordinary weights out.
    values = w[todo].sort(1).values.diff(dim=1).ne(0).sum(1) + 1
    todo = todo[values <= grid.levels]
    for steps, first in grid.candidates():
        if todo.numel() == 0:
            break
        left = w[todo]
        new_s, new_z = grid.fit(*grid.bounds(left), steps=steps, first=first)
        found = grid.matches(left, new_s, new_z).nonzero().flatten()
        s[todo[found]], z[todo[found]] = new_s[found], new_z[found]
        done[todo[found]] = True
        keep = torch.ones(todo.numel(), dtype=torch.bool)
        keep[found] = False
        todo = todo[keep]
    return done


def _lies_on_grid(weight: Tensor, group_size: int, grid: Grid) -> bool:
    """Whether many of some groups, spread over the rows, lie on a grid. Constant groups do not count."""
    size = weight.shape[1] if group_size == -1 else min(group_size, weight.shape[1])
    rows = torch.linspace(0, weight.shape[0] - 1, min(weight.shape[0], 128)).long()
    per_row = min(weight.shape[1] // size, max(1, SAMPLE // rows.numel()))
    w = weight[rows, : per_row * size].float().reshape(-1, size)
    w = w[w.amax(1) > w.amin(1)]
    if w.numel() == 0:
        return False
    s, z = grid.fit(*grid.bounds(w))
    return bool(_take_over(w, s, z, grid).float().mean() >= 0.25)


def pack_up(codes: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, group_size: int, name: str) -> Int4Weight:
    """The checked weight of codes, scales and zeros; in fp16 where that holds all of them exactly."""
    floats = (scales, zeros) if grid.kind == "float" else (scales,)
    dtype = torch.float16 if all(bool(is_fp16(t).all()) for t in floats) else torch.float32
    result = Int4Weight(codes, scales.to(dtype), group_size=group_size, bits=grid.bits)
    if grid.kind == "integer":
        result.zeros = zeros.to(torch.uint8)
    elif grid.kind == "float":
        result.offsets = zeros.to(dtype)
    return result.validate(name)
