"""torchao's int4 weights, as its tensor subclasses hold them and its safetensors files store them (never pickles).

For the parameter "module.weight" [N, K] with G groups a file has
    module._weight_qdata, module._weight_scale, module._weight_zero_point
and the subclass decides what they are:
    Int4Tensor                int8 [N, K/2], the earlier input in the low half, two's complement; scale and zero_point
                              float [G, N]: w = scale * q + zero_point
    IntxUnpackedToInt8Tensor  int8 [N, K] of -8..7 (or 8 bits); scale float [N, G], zero_point int8 or float [N, G]:
                              w = scale * (q - zero_point)
In memory also Int4OpaqueTensor: aten's own packing for CPUs, and scale_and_zero [G, N, 2]: w = scale * (q - 8) + zero.
Layouts for GPUs (tile-packed, preshuffled) are refused. Source: torchao 0.18, quantization/quantize_/workflows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.formats.parts import bits as _bits
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.weights import nibbles
from torch_int4.weights.canonical import Int4Weight

PREFIX = "_weight_"
FIELDS = ("qdata", "scale", "zero_point")
CONFIGS = ("Int4WeightOnlyConfig", "IntxWeightOnlyConfig")
KINDS = ("Int4Tensor", "IntxUnpackedToInt8Tensor", "Int4OpaqueTensor")


class TorchAo(Format):
    """`quant_method: torchao`."""

    name = "torchao"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By its method."""
        return config.get("quant_method") == "torchao"

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Weight-only integer configs; the group size is read off the tensors."""
        outer = config.get("quant_type")
        inner = outer.get("default", outer) if isinstance(outer, Mapping) else outer
        kind = inner.get("_type") if isinstance(inner, Mapping) else inner
        if kind not in CONFIGS or not isinstance(inner, Mapping):
            raise Int4Error(f"quantization_config.quant_type: {kind!r} is not served; accepted: {', '.join(CONFIGS)}")
        data = inner.get("_data") or {}
        packing = data.get("int4_packing_format")
        packing = packing.get("_data") if isinstance(packing, Mapping) else packing
        if packing is not None and str(packing).lower() != "plain":
            raise Int4Error(f"quantization_config.quant_type.int4_packing_format: {packing!r} is not served; PLAIN is")
        layout = "Int4Tensor" if kind == "Int4WeightOnlyConfig" else "IntxUnpackedToInt8Tensor"
        skip = _checks.names(config, "modules_to_not_convert")
        return Settings(4, -1, False, layout, mixed=True, skip=skip)

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """The subclass' three tensors."""
        return {PREFIX + field: True for field in FIELDS}

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`. `settings.layout` is the name of the subclass."""
        if settings.layout == "Int4Tensor":
            return _read_packed(tensors, shape, name)
        return _read_unpacked(tensors, settings.bits, shape, name)

    def holds(self, module: nn.Module) -> bool:
        """A linear whose weight is one of torchao's tensors."""
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and type(weight).__module__.startswith("torchao.")

    def convert_module(self, module: nn.Module, *, name: str) -> Int4Weight | None:
        """See `Format.convert_module`."""
        if not self.holds(module):
            return None
        weight: Any = module.weight
        kind = type(weight).__name__
        _checks.on_cpu(weight, name)
        bits = {"torch.int4": 4, "torch.int8": 8}.get(str(getattr(weight, "target_dtype", "torch.int4")))
        active = (
            getattr(weight, field, None) for field in ("act_pre_scale", "activation_quantization", "act_mapping_type")
        )
        if kind not in KINDS or bits is None or any(value is not None for value in active) or weight.dim() != 2:
            raise Int4Error(
                f"{name}: its weight is torchao's {kind}, which is not served (weight-only int4 in {', '.join(KINDS)} "
                "is); patch() the float model"
            )
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        if kind == "Int4OpaqueTensor":
            return _read_opaque(weight.qdata, weight.scale_and_zero, shape, name)
        tensors = {PREFIX + field: getattr(weight, field) for field in FIELDS}
        return self.read(tensors, Settings(bits, -1, False, kind, mixed=True), shape=shape, name=name)


def _group_size(groups: int, inputs: int, name: str) -> int:
    return _checks.groups_of(groups, inputs, -1, mixed=True, name=name)


def _read_packed(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> Int4Weight:
    rows, inputs = shape
    packed = _checks.take(tensors, PREFIX + "qdata", name, (torch.int8, torch.uint8), (rows, -(-inputs // 2)))
    codes = _bits.trim(nibbles.split(packed.contiguous().view(torch.uint8)), inputs, name) ^ 8
    scales = _checks.floats(tensors, PREFIX + "scale", name)
    if scales.dim() != 2 or scales.shape[1] != rows:
        raise Int4Error(f"{name}.{PREFIX}scale: must have shape [groups, {rows}], got {list(scales.shape)}")
    middle = _checks.floats(tensors, PREFIX + "zero_point", name, tuple(scales.shape))
    size = _group_size(scales.shape[0], inputs, f"{name}.{PREFIX}scale")
    return _around_eight(codes, scales.t(), middle.t(), size, name)


def _read_unpacked(tensors: Mapping[str, Tensor], bits: int, shape: tuple[int, int], name: str) -> Int4Weight:
    rows, inputs = shape
    qdata = _checks.take(tensors, PREFIX + "qdata", name, (torch.int8,), shape)
    half = 1 << (bits - 1)
    if int(qdata.min()) < -half or int(qdata.max()) >= half:
        raise Int4Error(f"{name}.{PREFIX}qdata: holds values outside {-half}..{half - 1}, the range of {bits} bits")
    codes = (qdata.short() + half).to(torch.uint8)
    scales = _checks.floats(tensors, PREFIX + "scale", name)
    if scales.dim() != 2 or scales.shape[0] != rows:
        raise Int4Error(f"{name}.{PREFIX}scale: must have shape [{rows}, groups], got {list(scales.shape)}")
    size = _group_size(scales.shape[1], inputs, f"{name}.{PREFIX}scale")
    zeros = _checks.take(tensors, PREFIX + "zero_point", name, (torch.int8, *_checks.FLOATS), tuple(scales.shape))
    weight = Int4Weight(codes, scales.contiguous(), group_size=size, bits=bits)
    if zeros.is_floating_point():
        weight.scales = scales.float()
        weight.offsets = -(weight.scales * (zeros.float() + half))
    elif bool(zeros.any()):
        if int(zeros.min()) < -half or int(zeros.max()) >= half:
            raise Int4Error(f"{name}.{PREFIX}zero_point: holds values outside {-half}..{half - 1}")
        weight.zeros = (zeros.short() + half).to(torch.uint8)
    return _checks.serve(weight, name)


def _read_opaque(qdata: Tensor, scale_and_zero: Tensor, shape: tuple[int, int], name: str) -> Int4Weight:
    """aten's packing for CPUs differs between processors, so it is asked for the place of each code."""
    rows, inputs = shape
    if qdata.dtype != torch.uint8 or qdata.numel() * 2 != rows * inputs or scale_and_zero.dim() != 3:
        raise Int4Error(f"{name}: torchao's packed weight has shape {list(qdata.shape)}, not that of {list(shape)}")
    places = torch.arange(rows * inputs, dtype=torch.int32).view(shape)
    source = torch.zeros(rows * inputs, dtype=torch.int64)
    for digit in range(-(-(rows * inputs - 1).bit_length() // 4)):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(((places >> (4 * digit)) & 15).contiguous(), 1)
        source |= nibbles.split(packed.reshape(-1)).long() << (4 * digit)
    codes = torch.empty(rows * inputs, dtype=torch.uint8)
    codes[source] = nibbles.split(qdata.reshape(-1))
    scales, middle = scale_and_zero[..., 0].t(), scale_and_zero[..., 1].t()
    size = _group_size(scale_and_zero.shape[0], inputs, name)
    return _around_eight(codes.view(shape), scales, middle, size, name)


def _around_eight(codes: Tensor, scales: Tensor, middle: Tensor, size: int, name: str) -> Int4Weight:
    """w = scale * (code - 8) + middle, as scale * code + offset in fp32."""
    scales, middle = scales.float().contiguous(), middle.float().contiguous()
    return _checks.serve(Int4Weight(codes, scales, offsets=middle - 8 * scales, group_size=size), name)


FORMAT = TorchAo()
