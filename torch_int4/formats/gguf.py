"""GGUF tensors (llama.cpp): blocks of 32 inputs, or of 256 with two levels of scales.

What lies on a grid that kernels have is taken over bit by bit, without rounding again. d, dmin and m are fp16, q
unsigned codes; one group is 32 inputs, of Q3_K and Q6_K 16:
    Q4_0  w = d*(q - 8)          Q4_1    w = d*q + m             Q4_K    w = (d*s)*q - (dmin*t), 6-bit s and t
    Q5_0  w = d*(q - 16)         Q5_1    w = d*q + m             Q5_K    as Q4_K
    Q8_0  w = d*q, q signed      IQ4_NL  w = d*value[q]          IQ4_XS  w = (d*s)*value[q], the code book iq4_nl
    Q6_K  w = (d*s)*(q - 32)     Q3_K    w = (d*s)*(q - 4)       MXFP4   w = 2^(e - 127)*value[q], the code book E2M1
Those with s keep their two levels: s and t are the `multipliers` of d and -dmin. Q3_K's codes take four bits here.
The others (Q2_K, IQ1 ... IQ3, ternary) can only be expanded to floats: `dense`.
Source: ggml's ggml-common.h and ggml-quants.c, and gguf-py 0.19, gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts.format import Format, Settings
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


class GgufBlocks(nn.Module):
    """A linear that keeps the blocks of a GGUF tensor until `patch` packs them.

    Attributes:
        weight: uint8 `[N, bytes per row]`.
        kind: a type of `BLOCKS`.
        bias: float `[N]`, or None.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, blocks: Tensor, kind: str, shape: tuple[int, ...], bias: Any = None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.kind = kind
        self.register_buffer("weight", blocks)
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the expanded weight: slow, for what is left out of `patch`."""
        shape = (self.out_features, self.in_features)
        weight = FORMAT.read(
            {"weight": self.weight}, Settings(layout=self.kind), shape=shape, name="weight"
        ).dequantize()
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


class Gguf(Format):
    """One tensor is one linear: {"weight": uint8 [N, bytes per row]}, and `settings.layout` names its type."""

    name = "gguf"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Files have no config; transformers puts this one into models that it loaded from GGUF."""
        return config.get("quant_method") == "gguf"

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Each tensor of a file has its own type."""
        return Settings(4, 32, mixed=True)

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """The blocks."""
        return {"weight": True}

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`. `settings.layout` is a type of `BLOCKS`."""
        if settings.layout not in BLOCKS:
            raise Int4Error(
                f"{name}: the GGUF type {settings.layout or '(none)'} lies on no grid of kernels and has to be "
                f"expanded to floats; taken over as they are: {', '.join(BLOCKS)}"
            )
        rows, inputs = shape
        per_block, size = BLOCKS[settings.layout]
        if inputs % per_block:
            raise Int4Error(f"{name}: has {inputs} inputs, and {settings.layout} holds multiples of {per_block}")
        raw = _checks.take(tensors, "weight", name, (torch.uint8,), (rows, inputs // per_block * size))
        weight = DECODERS[settings.layout](raw.reshape(rows, -1, size))
        return _checks.serve(weight, f"{name} ({settings.layout})")

    def holds(self, module: nn.Module) -> bool:
        """`GgufBlocks`, and transformers' `GgufLinear`; both keep the blocks of the file."""
        if isinstance(module, GgufBlocks):
            return True
        known = type(module).__name__ == "GgufLinear" and type(module).__module__.startswith("transformers.")
        return known and isinstance(module.weight, Tensor) and module.weight.dtype == torch.uint8

    def convert_module(self, module: nn.Module, *, name: str) -> Int4Weight | None:
        """See `Format.convert_module`; None for types without a grid."""
        if not self.holds(module) or _kind_of(module, name) not in BLOCKS:
            return None
        weight: Any = module.weight
        _checks.on_cpu(weight, name)
        settings = Settings(layout=_kind_of(module, name))
        shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        result = self.read({"weight": weight}, settings, shape=shape, name=name)
        order = getattr(module, "input_permutation", None)
        if isinstance(order, Tensor):  # it gathers its input by this index, as `perm` does
            result.perm = order.long()
        return result.validate(name)

    def dense_module(self, module: nn.Module, *, name: str) -> Tensor | None:
        """fp32 `[N, K]` of such a linear, whatever its type."""
        if not self.holds(module):
            return None
        weight, order = module.weight, getattr(module, "input_permutation", None)
        assert isinstance(weight, Tensor)
        shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        values = dense(weight, _kind_of(module, name), shape, name)
        if not isinstance(order, Tensor):
            return values
        ordered = torch.empty_like(values)
        ordered[:, order.long()] = values
        return ordered


def dense(raw: Tensor, kind: str, shape: tuple[int, ...], name: str) -> Tensor:
    """fp32 values of a tensor of any GGUF type, by the package gguf.

    Args:
        raw: uint8, the tensor's bytes.
        kind: the type's name, as "Q6_K" or "F16".
        shape: of the result.
        name: the tensor, for messages.
    """
    gguf = require_gguf(name)
    quantized = getattr(gguf.GGMLQuantizationType, kind)
    per_block, size = gguf.GGML_QUANT_SIZES[quantized]
    count = 1
    for extent in shape:
        count *= extent
    if count % per_block or raw.numel() != count // per_block * size:
        raise Int4Error(f"{name}: holds {raw.numel()} bytes, and {list(shape)} values of {kind} take others")
    if kind == "BF16":
        values = raw.view(torch.bfloat16).float()
    else:
        blocks = raw.contiguous().reshape(-1, shape[-1] // per_block * size).numpy()
        if kind in ("F16", "F32", "F64"):
            blocks = blocks.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[kind])
        try:
            values = torch.from_numpy(gguf.quants.dequantize(blocks, quantized)).float()
        except NotImplementedError as error:
            raise Int4Error(f"{name}: the GGUF type {kind} is not read by the installed package gguf") from error
    if not bool(torch.isfinite(values).all()):
        raise Int4Error(f"{name}: holds NaN or infinity, so the file is damaged")
    return values.reshape(shape)


def require_gguf(name: str) -> Any:
    """The package gguf.

    Raises:
        Int4Error: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise Int4Error(f"{name}: reading GGUF needs the package gguf; run: pip install gguf") from error
    return gguf


def _kind_of(module: Any, name: str) -> str:
    if isinstance(module, GgufBlocks):
        return module.kind
    return str(require_gguf(name).GGMLQuantizationType(int(module.ggml_type)).name)


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

FORMAT = Gguf()
