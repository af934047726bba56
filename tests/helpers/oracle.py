"""The right results of operators, in float64, from the same quantized operands."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_int4 import Int4Weight


def random_weight(
    rows: int,
    inputs: int,
    group_size: int,
    kind: str = "symmetric",
    *,
    bits: int = 4,
    scale_dtype: torch.dtype = torch.float16,
    zero: int | None = None,
    codebook: str | None = None,
    seed: int = 0,
) -> Int4Weight:
    """A valid random weight; kind is symmetric, integer, float, "records" of scales and offsets with two levels, or
    "scales" of two levels without offsets."""
    g = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    codes = torch.randint(0, 2**bits, (rows, inputs), dtype=torch.uint8, generator=g)
    if kind == "records":
        return _two_levels(codes, bits, g)
    if kind == "scales":
        return _two_level_scales(codes, group_size, bits, codebook, g)
    scales = ((torch.rand(rows, groups, generator=g) + 0.1) * 0.02).to(scale_dtype)
    zeros = offsets = None
    if kind == "integer":
        zeros = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=g)
        if zero is not None:
            zeros.fill_(zero)
    if kind == "float":
        offsets = (torch.randn(rows, groups, generator=g) * 0.1).to(scale_dtype)
    return Int4Weight(codes, scales, zeros, offsets, None, group_size, bits, codebook).validate()


def _two_levels(codes: Tensor, bits: int, g: torch.Generator) -> Int4Weight:
    """Scales of both signs, and every multiplier of six bits."""
    rows, inputs = codes.shape
    shared = torch.randn(2, rows, inputs // 256, generator=g).mul_(1e-2).half()
    multipliers = torch.randint(0, 64, (rows, inputs // 32, 2), dtype=torch.uint8, generator=g)
    return Int4Weight(codes, shared[0], offsets=shared[1], bits=bits, multipliers=multipliers).validate()


def _two_level_scales(codes: Tensor, size: int, bits: int, codebook: str | None, g: torch.Generator) -> Int4Weight:
    """Numbers of both signs, and every multiplier."""
    rows, inputs = codes.shape
    shared = torch.randn(rows, inputs // 256, generator=g).mul_(1e-3).half()
    multipliers = torch.randint(-128, 128, (rows, inputs // size), dtype=torch.int8, generator=g)
    made = Int4Weight(codes, shared, group_size=size, bits=bits, codebook=codebook, multipliers=multipliers)
    return made.validate()


def block_size(inputs: int, group_size: int) -> int:
    padded = -(-inputs // 32) * 32
    group = padded if group_size == -1 else min(group_size, padded)
    return min(group, 128)


def quantize_rows(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of symmetric int8 per block, in the fp32 arithmetic of the kernels: [M, B, block], [M, B]."""
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    absmax = blocks.abs().amax(-1)
    top = torch.full_like(absmax, 127.0)  # a tensor: torch divides scalars through a rounded reciprocal
    inverse = torch.where(absmax > 0, top / absmax, 0.0)
    return (blocks * inverse[..., None]).round(), absmax / top


def rounded_rows(x: Tensor, weight: Int4Weight) -> Tensor:
    """x in float64 after int8 rounding."""
    codes, scales = quantize_rows(x, block_size(weight.in_features, weight.group_size))
    return (codes.double() * scales.double()[..., None]).flatten(1)[:, : weight.in_features]


def linear_int8(x: Tensor, weight: Int4Weight) -> Tensor:
    """x Wᵀ with rows of x quantized to int8 per block, summed in float64."""
    return rounded_rows(x, weight) @ dense(weight).T


def sum_error(y: Tensor, x: Tensor, weight: Int4Weight) -> float:
    """The largest error of an int8 product, over the sum of the magnitudes that were added."""
    magnitudes = rounded_rows(x, weight).abs() @ dense(weight).abs().T
    return float(((y.double() - linear_int8(x, weight)).abs() / magnitudes.clamp_min(1e-300)).max())


def dense(weight: Int4Weight) -> Tensor:
    """The weight in float64."""
    k = torch.arange(weight.in_features)
    group = k * 0 if weight.group_size == -1 else k // weight.group_size
    scales, codes = weight.scales.double(), weight.codes.double()
    if weight.multipliers is not None:  # of scales alone
        own = weight.multipliers.double()
        scales = scales.repeat_interleave(own.shape[1] // scales.shape[1], 1) * own
    scales = scales[:, group]
    if weight.codebook is not None:
        return scales * torch.ops.torch_int4.codebook(weight.codebook).double()[weight.codes.long()]
    if weight.offsets is not None:
        return scales * codes + weight.offsets.double()[:, group]
    zero = 2 ** (weight.bits - 1) if weight.zeros is None else weight.zeros.double()[:, group]
    return scales * (codes - zero)


def scaled_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))
