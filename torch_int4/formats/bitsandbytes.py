"""bitsandbytes 4-bit weights, NF4 and FP4, with double quantization ("compressed statistics").

The weight [N, K] is flattened and cut into blocks (64 by default):
    weight                    uint8 [N*K/2, 1] (or other types of the same bytes), a byte's high half first
    weight.absmax             fp32 [blocks]; or uint8 when nested
    weight.quant_map          fp32 [16], the code book
    weight.nested_absmax      fp32 [blocks / 256], weight.nested_quant_map fp32 [256]; when nested
    weight.quant_state.bitsandbytes__nf4 (or fp4)   uint8, JSON: blocksize, shape, nested_blocksize, nested_offset ...
w = absmax * quant_map[code]; nested: absmax = nested_quant_map[code] * nested_absmax + nested_offset.
Its FP4 is not E2M1: the smallest value is 1/192 of the largest and not 1/12.
Source: bitsandbytes 0.50, functional.py (QuantState, dequantize_4bit).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts import flat as _flat
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.formats.parts.safetensors import parse_json
from torch_int4.weights import nibbles
from torch_int4.weights.canonical import Int4Weight

STATE = "weight.quant_state.bitsandbytes__"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODEBOOK = {"nf4": "nf4", "fp4": "bnb_fp4"}


@dataclass
class _Blocks:
    """Codes uint8 `[N, K]` and the magnitude of each block, fp32."""

    codes: Tensor
    absmax: Tensor
    block: int


class BitsAndBytes(Format):
    """`quant_method: bitsandbytes` with `load_in_4bit`."""

    name = "bitsandbytes"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By its method, or the flag of old files."""
        return config.get("quant_method") == "bitsandbytes" or bool(config.get("_load_in_4bit"))

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """LLM.int8() is refused: its outlier columns are computed apart."""
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            raise Int4Error("quantization_config.load_in_8bit: LLM.int8() weights are not served, 4-bit ones are")
        kind = _checks.choice(config, "bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
        skip = _checks.names(config, "llm_int8_skip_modules")
        return Settings(4, 64, layout=kind, mixed=True, skip=skip)

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """The blocks' magnitudes come first: a float linear has a "weight", too."""
        return {
            "weight.absmax": True,
            "weight": True,
            STATE + settings.layout: True,
            "weight.quant_map": True,
            "weight.nested_absmax": False,
            "weight.nested_quant_map": False,
        }

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`."""
        blocks = _read_blocks(tensors, settings, shape, name)
        size = _flat.group_size(shape[1], blocks.block, name)
        scales = _flat.per_group(blocks.absmax, shape, blocks.block, size)
        book = CODEBOOK[settings.layout]
        return _checks.serve(Int4Weight(blocks.codes, scales, group_size=size, codebook=book), name)

    def read_dense(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Tensor:
        """fp32 `[N, K]`, for rows and blocks of any size."""
        blocks = _read_blocks(tensors, settings, shape, name)
        values = _codebook(settings.layout)[blocks.codes.long()].view(-1)
        magnitudes = blocks.absmax.repeat_interleave(blocks.block)[: values.numel()]
        return (values * magnitudes).view(shape)

    def holds(self, module: nn.Module) -> bool:
        """A `Linear4bit`."""
        return type(getattr(module, "weight", None)).__name__ == "Params4bit"

    def convert_module(self, module: nn.Module, *, name: str) -> Int4Weight | None:
        """A `Linear4bit`."""
        if not self.holds(module):
            return None
        tensors, settings, shape = _module_tensors(module, name)
        return self.read(tensors, settings, shape=shape, name=name)

    def dense_module(self, module: nn.Module, *, name: str) -> Tensor | None:
        """A `Linear4bit` in NF4 or FP4."""
        if not self.holds(module):
            return None
        tensors, settings, shape = _module_tensors(module, name)
        return self.read_dense(tensors, settings, shape=shape, name=name)


def _codebook(kind: str) -> Tensor:
    values: Tensor = torch.ops.torch_int4.codebook(CODEBOOK[kind])
    return values


def _read_blocks(tensors: Mapping[str, Tensor], settings: Settings, shape: tuple[int, int], name: str) -> _Blocks:
    rows, inputs = shape
    state = _read_state(tensors, settings, name)
    if state.get("shape") != [rows, inputs]:
        raise Int4Error(f"{name}.{STATE}{settings.layout}: says {state.get('shape')}, the linear is {[rows, inputs]}")
    block = state.get("blocksize")
    if isinstance(block, bool) or block not in BLOCKS:
        raise Int4Error(f"{name}.{STATE}{settings.layout}: blocksize {block!r} is not one of {BLOCKS}")
    if state.get("quant_type", settings.layout) != settings.layout:
        raise Int4Error(f"{name}.{STATE}{settings.layout}: says quant_type {state.get('quant_type')!r}")
    values = _checks.floats(tensors, "weight.quant_map", name, (16,))
    if not torch.allclose(values.float(), _codebook(settings.layout), rtol=0, atol=1e-4):
        raise Int4Error(f"{name}.weight.quant_map: is not the code book of {settings.layout}")
    packed = _checks.take(tensors, "weight", name, (torch.uint8, torch.int8, *_checks.FLOATS))
    raw = packed.reshape(-1).view(torch.uint8)
    if raw.numel() * 2 < rows * inputs or raw.numel() > -(-rows * inputs // 2) + 8:
        raise Int4Error(
            f"{name}.weight: holds {raw.numel()} bytes, and {rows} x {inputs} codes take {rows * inputs // 2}"
        )
    low, high = nibbles.low_high(raw)
    codes = torch.stack((high, low), dim=-1).flatten()[: rows * inputs].view(rows, inputs)
    return _Blocks(codes, _read_absmax(tensors, state, _flat.count(shape, block), name), block)


def _read_state(tensors: Mapping[str, Tensor], settings: Settings, name: str) -> dict[str, Any]:
    key = STATE + settings.layout
    raw = _checks.take(tensors, key, name, (torch.uint8,))
    if raw.dim() != 1 or raw.numel() > 1 << 16:
        raise Int4Error(f"{name}.{key}: must be at most {1 << 16} bytes of JSON, got shape {list(raw.shape)}")
    return parse_json(raw.contiguous().numpy().tobytes(), f"{name}.{key}")


def _read_absmax(tensors: Mapping[str, Tensor], state: Mapping[str, Any], blocks: int, name: str) -> Tensor:
    absmax = _checks.take(tensors, "weight.absmax", name, (torch.float32, torch.uint8), (blocks,))
    if absmax.dtype == torch.float32:
        return _checks.floats(tensors, "weight.absmax", name)
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= 1 << 16:
        raise Int4Error(f"{name}: nested_blocksize {size!r} is not a size of blocks")
    if not isinstance(offset, (int, float)) or isinstance(offset, bool) or not abs(offset) < 3e38:
        raise Int4Error(f"{name}: nested_offset {offset!r} is not a finite number")
    outer = _checks.floats(tensors, "weight.nested_absmax", name, (-(-blocks // size),)).float()
    values = _checks.floats(tensors, "weight.nested_quant_map", name, (256,)).float()
    expanded = values[absmax.long()] * outer.repeat_interleave(size)[:blocks]
    return expanded + torch.tensor(float(offset), dtype=torch.float32)


def _module_tensors(module: nn.Module, name: str) -> tuple[dict[str, Tensor], Settings, tuple[int, int]]:
    """The tensors that a file of this module would hold."""
    weight: Any = module.weight
    _checks.on_cpu(weight, name)
    state = weight.quant_state
    if state is None:
        raise Int4Error(f"{name}: its weight is not quantized yet; bitsandbytes does that in model.to('cpu')")
    if getattr(state, "packing_format_for_cpu", False):
        raise Int4Error(f"{name}: bitsandbytes has repacked its weight for its own CPU kernel; load the model again")
    tensors = {"weight": weight.data}
    for key, value in state.as_dict(packed=True).items():
        tensors[key if key.startswith("weight.") else f"weight.{key}"] = value
    rows, inputs = (int(extent) for extent in state.shape)
    return tensors, Settings(4, 64, layout=str(state.quant_type), mixed=True), (rows, inputs)


FORMAT = BitsAndBytes()
