"""HQQ (half-quadratic quantization): a scale and a float zero point per group.

Per linear [N, K], flattened into groups of `group_size` values (axis=1), G = N*K / group_size:
    W_q    uint8 [G/2, group_size]: groups of the first half in the high nibbles, those of the second in the low ones;
           8 bits: uint8 [G, group_size]
    scale  float [G, 1], zero  float [G, 1]
and what HQQLinear keeps besides, encoded as tensors: nbits, group_size, axis, packing, shape ...
w = scale * (q - zero) = scale * q + (-scale * zero). axis=0 groups inputs of other rows; such weights are expanded to
floats. Source: hqq 0.2.8, core/quantize.py and core/bitpack.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts import flat as _flat
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.weights import nibbles
from torch_int4.weights.canonical import Int4Weight

PACKINGS = {4: "4bit_u8", 8: "8bit_u8"}


class Hqq(Format):
    """`quant_method: hqq`."""

    name = "hqq"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By its method."""
        return config.get("quant_method") == "hqq"

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """4 or 8 bits along either axis; quantized scales are refused."""
        outer = config.get("quant_config", config)
        if not isinstance(outer, Mapping):
            raise Int4Error("quantization_config.quant_config: must be a table of settings")
        for key in ("scale_quant_params", "zero_quant_params"):
            if outer.get(key):
                raise Int4Error(f"quantization_config.quant_config.{key}: quantized scales and zeros are not served")
        weights = outer.get("weight_quant_params", outer)
        if not isinstance(weights, Mapping):
            raise Int4Error("quantization_config.quant_config.weight_quant_params: must be a table of settings")
        bits = _checks.choice(weights, "nbits", (4, 8))
        axis = _checks.choice(weights, "axis", (0, 1), 1)
        if _checks.flag(weights, "view_as_float", False):
            raise Int4Error("quantization_config.view_as_float: is not served; quantize with view_as_float=False")
        size = _checks.group_size(weights, "group_size", 64) if weights.get("group_size") is not None else -1
        skip = _checks.names(config, "skip_modules")
        return Settings(bits, size, False, f"axis{axis}", mixed=bool(config.get("dynamic_config")), skip=skip)

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """Codes, scales and zeros; the encoded settings of a module where its file keeps them."""
        optional = ("nbits", "group_size", "axis", "packing", "shape")
        return {"W_q": True, "scale": True, "zero": True, **dict.fromkeys(optional, False)}

    def on_grid(self, settings: Settings) -> bool:
        """axis=1: groups of the weights of a row."""
        return settings.layout != "axis0"

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`. axis=0 is refused; `read_dense` expands it."""
        _check_encoded(tensors, settings, shape, name)
        if not self.on_grid(settings):
            raise Int4Error(
                f"{name}: axis=0 groups weights of several rows, which no kernel serves; expand it to floats"
            )
        block = shape[1] if settings.group_size == -1 else settings.group_size
        groups = _groups(shape, block, name)
        codes = _unpack(tensors, settings.bits, (groups, block), name).view(shape)
        size = _flat.group_size(shape[1], block, name)
        scale, offset = _affine(tensors, (groups, 1), name)
        scales, offsets = (_flat.per_group(value, shape, block, size) for value in (scale, offset))
        weight = Int4Weight(codes, scales, offsets=offsets, group_size=size, bits=settings.bits)
        return _checks.serve(weight, name)

    def read_dense(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Tensor:
        """fp32 `[N, K]`, for both axes."""
        if settings.layout != "axis0":
            return self.read(tensors, settings, shape=shape, name=name).dequantize()
        _check_encoded(tensors, settings, shape, name)
        block = shape[0] if settings.group_size == -1 else settings.group_size
        groups = _groups(shape, block, name)
        codes = _unpack(tensors, settings.bits, (block, groups), name)
        scale, offset = _affine(tensors, (1, groups), name)
        return (codes * scale + offset).view(shape)

    def holds(self, module: nn.Module) -> bool:
        """An `HQQLinear`."""
        known = type(module).__name__ == "HQQLinear" and isinstance(getattr(module, "meta", None), dict)
        return known and isinstance(getattr(module, "W_q", None), Tensor)

    def convert_module(self, module: nn.Module, *, name: str) -> Int4Weight | None:
        """An `HQQLinear` along axis 1."""
        if not self.holds(module):
            return None
        tensors, settings, shape = _of_module(module, name)
        return None if settings.layout == "axis0" else self.read(tensors, settings, shape=shape, name=name)

    def dense_module(self, module: nn.Module, *, name: str) -> Tensor | None:
        """An `HQQLinear` along either axis."""
        if not self.holds(module):
            return None
        tensors, settings, shape = _of_module(module, name)
        return self.read_dense(tensors, settings, shape=shape, name=name)


def _groups(shape: tuple[int, int], block: int, name: str) -> int:
    if shape[0] * shape[1] % block:
        raise Int4Error(f"{name}: has {shape[0]} x {shape[1]} weights, which are no full groups of {block}")
    return shape[0] * shape[1] // block


def _unpack(tensors: Mapping[str, Tensor], bits: int, shape: tuple[int, int], name: str) -> Tensor:
    """uint8 codes; two halves of the rows share bytes."""
    rows, columns = shape
    if bits == 8:
        return _checks.take(tensors, "W_q", name, (torch.uint8,), shape).contiguous()
    if rows % 2:
        raise Int4Error(f"{name}.W_q: {rows} groups cannot share bytes in pairs")
    packed = _checks.take(tensors, "W_q", name, (torch.uint8,), (rows // 2, columns))
    low, high = nibbles.low_high(packed)
    return torch.cat((high, low))


def _affine(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> tuple[Tensor, Tensor]:
    """fp32 scale and offset."""
    scale = _checks.floats(tensors, "scale", name, shape).float()
    zero = _checks.floats(tensors, "zero", name, shape).float()
    return scale, -(scale * zero)


def _check_encoded(tensors: Mapping[str, Tensor], settings: Settings, shape: tuple[int, int], name: str) -> None:
    """A module's own settings must agree with the tensors."""
    expected = {"nbits": settings.bits, "axis": int(settings.layout == "axis1"), "shape": list(shape)}
    if settings.group_size != -1:
        expected["group_size"] = settings.group_size
    for key, want in expected.items():
        value = tensors.get(key)
        if value is None or value.numel() == 0:
            continue
        found = value.tolist()
        found = [int(extent) for extent in found] if isinstance(found, list) else found
        if found != want:
            raise Int4Error(f"{name}.{key}: says {found}, and the config and model say {want}")


def _of_module(module: nn.Module, name: str) -> tuple[dict[str, Tensor], Settings, tuple[int, int]]:
    codes: Any = module.W_q
    meta: Any = module.meta
    _checks.on_cpu(codes, name)
    if meta.get("quant_scale") or meta.get("quant_zero") or meta.get("view_as_float"):
        raise Int4Error(f"{name}: HQQ with quantized scales or view_as_float is not served; load the float model")
    bits, axis, size = meta.get("nbits"), meta.get("axis"), meta.get("group_size")
    if bits not in PACKINGS or meta.get("packing") != PACKINGS[bits] or axis not in (0, 1):
        raise Int4Error(f"{name}: HQQ with nbits={bits!r}, packing={meta.get('packing')!r} is not served; 4 and 8 are")
    settings = Settings(bits, -1 if size is None else int(size), False, f"axis{axis}")
    tensors = {"W_q": codes.data, "scale": meta["scale"], "zero": meta["zero"]}
    rows, inputs = (int(extent) for extent in meta["shape"])
    return tensors, settings, (rows, inputs)


FORMAT = Hqq()
