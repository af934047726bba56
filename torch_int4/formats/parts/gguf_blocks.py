"""Blocks of GGUF that lie on a grid of kernels: of 32 inputs, or of 256 with two levels of scales.

d, dmin and m are fp16, q unsigned codes; one group is 32 inputs, of Q3_K and Q6_K 16:
    Q4_0  w = d*(q - 8)          Q4_1    w = d*q + m             Q4_K    w = (d*s)*q - (dmin*t), 6-bit s and t
    Q5_0  w = d*(q - 16)         Q5_1    w = d*q + m             Q5_K    as Q4_K
    Q8_0  w = d*q, q signed      IQ4_NL  w = d*value[q]          IQ4_XS  w = (d*s)*value[q], the code book iq4_nl
    Q6_K  w = (d*s)*(q - 32)     Q3_K    w = (d*s)*(q - 4)       MXFP4   w = 2^(e - 127)*value[q], the code book E2M1
Those with s keep their two levels: s and t are the `multipliers` of d and -dmin. Q3_K's codes take four bits here.
Source: ggml's ggml-common.h and ggml-quants.c, and gguf-py 0.19, gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_int4.weights import nibbles
from torch_int4.weights.canonical import Int4Weight

# type: (inputs, bytes) of a block
BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "IQ4_NL": (32, 18),
    "MXFP4": (32, 17),
    "Q4_K": (256, 144),
    "Q3_K": (256, 110),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_XS": (256, 136),
}


def _half(blocks: Tensor, at: int) -> Tensor:
    """fp16 `[N, blocks]` at a byte of each block."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _halves(packed: Tensor) -> Tensor:
    """uint8 `[N, blocks, 16]` to `[N, blocks * 32]`: all low nibbles of a block, then all high ones."""
    return torch.cat(nibbles.low_high(packed), dim=-1).flatten(1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """The bits of a 32-bit word at a byte of each block, 16 or 0, `[N, blocks * 32]`."""
    bits = (blocks[..., at : at + 4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return (bits << 4).flatten(1)


def _q4_0(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_halves(blocks[..., 2:]), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_halves(blocks[..., 4:]), _half(blocks, 0), offsets=_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Int4Weight:
    codes = _halves(blocks[..., 6:]) | _fifth_bits(blocks, 2)
    return Int4Weight(codes, _half(blocks, 0), bits=5)


def _q5_1(blocks: Tensor) -> Int4Weight:
    codes = _halves(blocks[..., 8:]) | _fifth_bits(blocks, 4)
    return Int4Weight(codes, _half(blocks, 0), offsets=_half(blocks, 2), bits=5)


def _q8_0(blocks: Tensor) -> Int4Weight:
    return Int4Weight(blocks[..., 2:].flatten(1) ^ 128, _half(blocks, 0), bits=8)  # two's complement plus 128


def _iq4_nl(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_halves(blocks[..., 2:]), _half(blocks, 0), codebook="iq4_nl")


def _mxfp4(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_halves(blocks[..., 1:]), blocks[..., 0].contiguous(), codebook="fp4")


def _q4_k(blocks: Tensor) -> Int4Weight:
    return _two_levels(blocks, _k_nibbles(blocks[..., 16:]), 4)


def _q5_k(blocks: Tensor) -> Int4Weight:
    # byte i of the high bits holds those of input i of each of the eight groups
    high = (blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    codes = _k_nibbles(blocks[..., 48:]) | (high << 4).flatten(1)
    return _two_levels(blocks, codes, 5)


def _q3_k(blocks: Tensor) -> Int4Weight:
    # byte i of the mask holds the third bits of input i of each of the eight groups of 32; two bits of four such groups
    # share a byte of the codes
    high = (blocks[..., None, 0:32] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    low = _pairs(blocks[..., 32:96].unflatten(-1, (2, 32)))
    codes = low.flatten(1) | (high << 2).flatten(1)
    scales = _six_bit_scales(blocks[..., 96:108])
    return _signed_levels(codes + (8 - 4), blocks, 108, scales, 4)


def _q6_k(blocks: Tensor) -> Int4Weight:
    # of each half of a block: 64 bytes whose low nibbles are those of two groups of 32, and high ones of two more
    low = torch.cat(nibbles.low_high(blocks[..., 0:128].unflatten(-1, (2, 64))), dim=-1)
    high = _pairs(blocks[..., 128:192].unflatten(-1, (2, 32)))
    codes = low.flatten(1) | (high.flatten(1) << 4)
    return _signed_levels(codes, blocks, 208, blocks[..., 192:208].view(torch.int8), 6)


def _iq4_xs(blocks: Tensor) -> Int4Weight:
    high = blocks[..., 2:4].contiguous().view(torch.int16).int() & 0xFFFF
    high = (high >> torch.arange(0, 16, 2, dtype=torch.int32)) & 3
    low = nibbles.split(blocks[..., 4:8]).int()
    multipliers = ((low | (high << 4)) - 32).to(torch.int8).flatten(1)
    codes = _halves(blocks[..., 8:].unflatten(-1, (8, 16)).flatten(1, 2))
    return Int4Weight(codes, _half(blocks, 0), codebook="iq4_nl", multipliers=multipliers)


def _k_nibbles(packed: Tensor) -> Tensor:
    """uint8 `[N, blocks, 128]` to `[N, blocks * 256]`: of each 32 bytes the low nibbles, then the high ones."""
    parts = packed.unflatten(-1, (4, 32))
    return torch.stack(nibbles.low_high(parts), dim=-2).flatten(1)


def _pairs(packed: Tensor) -> Tensor:
    """The pairs of bits of uint8 `[..., 32]`, `[..., 4, 32]`: the lowest ones of all bytes first."""
    return (packed[..., None, :] >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]) & 3


def _six_bit_scales(packed: Tensor) -> Tensor:
    """int8 `[N, blocks, 16]` of twelve bytes: the nibbles of eight, low ones first, and pairs of bits of four above."""
    low = torch.cat(nibbles.low_high(packed[..., :8]), dim=-1)
    high = _pairs(packed[..., 8:]).flatten(-2)
    return (low | (high << 4)).to(torch.int8) - 32


def _signed_levels(codes: Tensor, blocks: Tensor, at: int, multipliers: Tensor, bits: int) -> Int4Weight:
    """A weight in groups of 16 whose scales are fp16 numbers, at a byte of each block, times int8 `[N, blocks, 16]`."""
    levels = multipliers.flatten(1).contiguous()
    return Int4Weight(codes, _half(blocks, at), group_size=16, bits=bits, multipliers=levels)


def _two_levels(blocks: Tensor, codes: Tensor, bits: int) -> Int4Weight:
    """A weight of Q4_K or Q5_K: its scales d and offsets -dmin, and the multipliers of both.

    Twelve bytes hold eight 6-bit scales and eight 6-bit minima: those of groups 0-3 in the low bits of bytes 0-3 and
    4-7; those of groups 4-7 as nibbles of bytes 8-11, with their top two bits above the former.
    """
    packed = blocks[..., 4:16]
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    low, high = nibbles.low_high(third)
    scales = torch.cat((first & 63, nibbles.pair(low, first >> 6)), dim=-1)
    minima = torch.cat((second & 63, nibbles.pair(high, second >> 6)), dim=-1)
    multipliers = torch.stack((scales.flatten(1), minima.flatten(1)), dim=-1)
    return Int4Weight(codes, _half(blocks, 0), offsets=-_half(blocks, 2), bits=bits, multipliers=multipliers)


DECODERS: dict[str, Callable[[Tensor], Int4Weight]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
    "Q4_K": _q4_k,
    "Q3_K": _q3_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
}
