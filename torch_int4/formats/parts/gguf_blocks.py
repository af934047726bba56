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
from typing import NamedTuple

import torch
from torch import Tensor

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


class Run(NamedTuple):
    """Of `number` bytes of a block from `byte` on, `width` bits above `shift` are bits of as many codes from `first`
    on, those above `left` (`torch.ops.torch_int4.gather_bits`)."""

    first: int
    number: int
    byte: int
    shift: int
    width: int
    left: int = 0


def _halves(byte: int) -> list[Run]:
    """Codes of 32 inputs in 16 bytes: all low nibbles, then all high ones."""
    return [Run(0, 16, byte, 0, 4), Run(16, 16, byte, 4, 4)]


def _fifth_bits(byte: int) -> list[Run]:
    """The fifth bits of 32 codes in a word of 32 bits."""
    return [Run(i, 1, byte + i // 8, i % 8, 1, 4) for i in range(32)]


def _k_nibbles(byte: int) -> list[Run]:
    """Codes of 256 inputs in 128 bytes: of each 32 bytes the low nibbles, then the high ones."""
    places = [(group, half) for group in range(4) for half in range(2)]
    return [Run(64 * group + 32 * half, 32, byte + 32 * group, 4 * half, 4) for group, half in places]


def _planes(byte: int, left: int) -> list[Run]:
    """One bit of 256 codes in 32 bytes: byte i holds those of input i of each of the eight groups of 32."""
    return [Run(32 * group, 32, byte, group, 1, left) for group in range(8)]


def _pairs(byte: int, left: int) -> list[Run]:
    """Two bits of 256 codes in 64 bytes: a byte of each half holds those of an input of each of four groups of 32."""
    places = [(half, group) for half in range(2) for group in range(4)]
    return [Run(128 * half + 32 * group, 32, byte + 32 * half, 2 * group, 2, left) for half, group in places]


def _q6_low() -> list[Run]:
    """Of each half of a block 64 bytes, whose low nibbles are those of two groups of 32, and high ones of two more."""
    places = [(half, high) for half in range(2) for high in range(2)]
    return [Run(128 * half + 64 * high, 64, 64 * half, 4 * high, 4) for half, high in places]


def _iq4_xs_low() -> list[Run]:
    places = [(group, high) for group in range(8) for high in range(2)]
    return [Run(32 * group + 16 * high, 16, 8 + 16 * group, 4 * high, 4) for group, high in places]


CODES = {
    "Q4_0": _halves(2),
    "Q4_1": _halves(4),
    "Q5_0": [*_halves(6), *_fifth_bits(2)],
    "Q5_1": [*_halves(8), *_fifth_bits(4)],
    "Q8_0": [Run(0, 32, 2, 0, 8)],
    "IQ4_NL": _halves(2),
    "MXFP4": _halves(1),
    "Q4_K": _k_nibbles(16),
    "Q5_K": [*_k_nibbles(48), *_planes(16, 4)],
    "Q3_K": [*_pairs(32, 0), *_planes(0, 2)],
    "Q6_K": [*_q6_low(), *_pairs(128, 4)],
    "IQ4_XS": _iq4_xs_low(),
}

# The multipliers of eight groups: those of scale and offset in turn, of six bits in twelve bytes. Bytes 4-7 and 8-11
# hold those of the first four groups; the low and the high nibbles of bytes 12-15 those of the others, whose top two
# bits are above the former.
SCALES_AND_MINIMA = [
    *(Run(2 * g + minimum, 1, 4 + 4 * minimum + g, 0, 6) for g in range(4) for minimum in range(2)),
    *(Run(8 + 2 * g + minimum, 1, 12 + g, 4 * minimum, 4) for g in range(4) for minimum in range(2)),
    *(Run(8 + 2 * g + minimum, 1, 4 + 4 * minimum + g, 6, 2, 4) for g in range(4) for minimum in range(2)),
]
# Those of sixteen groups in twelve bytes: the nibbles of eight, low ones first, and pairs of bits of four above.
SIX_BITS = [
    *(Run(8 * high, 8, 96, 4 * high, 4) for high in range(2)),
    *(Run(4 * group, 4, 104, 2 * group, 2, 4) for group in range(4)),
]
# Those of eight groups: nibbles of bytes 4-7, and pairs of bits of the two bytes before these above.
IQ4_XS_SCALES = [
    *(Run(g, 1, 4 + g // 2, 4 * (g % 2), 4) for g in range(8)),
    *(Run(g, 1, 2 + g // 4, 2 * (g % 4), 2, 4) for g in range(8)),
]


def _gather(blocks: Tensor, runs: list[Run], codes: int) -> Tensor:
    """uint8 `[N, blocks * codes]` of uint8 `[N, blocks, bytes]`."""
    flat = [field for run in runs for field in run]
    gathered: Tensor = torch.ops.torch_int4.gather_bits(blocks, flat, codes)
    return gathered


def _codes(blocks: Tensor, kind: str) -> Tensor:
    return _gather(blocks, CODES[kind], BLOCKS[kind][0])


def _half(blocks: Tensor, at: int) -> Tensor:
    """fp16 `[N, blocks]` at a byte of each block."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _q4_0(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_codes(blocks, "Q4_0"), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_codes(blocks, "Q4_1"), _half(blocks, 0), offsets=_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_codes(blocks, "Q5_0"), _half(blocks, 0), bits=5)


def _q5_1(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_codes(blocks, "Q5_1"), _half(blocks, 0), offsets=_half(blocks, 2), bits=5)


def _q8_0(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_codes(blocks, "Q8_0").bitwise_xor_(128), _half(blocks, 0), bits=8)  # two's complement plus 128


def _iq4_nl(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_codes(blocks, "IQ4_NL"), _half(blocks, 0), codebook="iq4_nl")


def _mxfp4(blocks: Tensor) -> Int4Weight:
    return Int4Weight(_codes(blocks, "MXFP4"), blocks[..., 0].contiguous(), codebook="fp4")


def _q4_k(blocks: Tensor) -> Int4Weight:
    return _two_levels(blocks, "Q4_K", 4)


def _q5_k(blocks: Tensor) -> Int4Weight:
    return _two_levels(blocks, "Q5_K", 5)


def _q3_k(blocks: Tensor) -> Int4Weight:
    scales = _gather(blocks, SIX_BITS, 16).to(torch.int8).sub_(32)
    return _signed_levels(_codes(blocks, "Q3_K").add_(8 - 4), blocks, 108, scales, 4)


def _q6_k(blocks: Tensor) -> Int4Weight:
    scales = blocks[..., 192:208].view(torch.int8).flatten(1).contiguous()
    return _signed_levels(_codes(blocks, "Q6_K"), blocks, 208, scales, 6)


def _iq4_xs(blocks: Tensor) -> Int4Weight:
    multipliers = _gather(blocks, IQ4_XS_SCALES, 8).to(torch.int8).sub_(32)
    return Int4Weight(_codes(blocks, "IQ4_XS"), _half(blocks, 0), codebook="iq4_nl", multipliers=multipliers)


def _signed_levels(codes: Tensor, blocks: Tensor, at: int, multipliers: Tensor, bits: int) -> Int4Weight:
    """A weight in groups of 16 whose scales are fp16 numbers, at a byte of each block, times int8 `[N, groups]`."""
    return Int4Weight(codes, _half(blocks, at), group_size=16, bits=bits, multipliers=multipliers)


def _two_levels(blocks: Tensor, kind: str, bits: int) -> Int4Weight:
    """A weight of Q4_K or Q5_K: its scales d and offsets -dmin, and the multipliers of both."""
    multipliers = _gather(blocks, SCALES_AND_MINIMA, 16).unflatten(-1, (-1, 2))
    offsets = -_half(blocks, 2)
    return Int4Weight(_codes(blocks, kind), _half(blocks, 0), offsets=offsets, bits=bits, multipliers=multipliers)


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
