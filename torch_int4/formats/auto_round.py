"""AutoRound files (Intel auto-round): GPTQ's or AWQ's packing under a config of their own.

`packing_format` says which:
    auto_round:auto_gptq   GPTQ's layout with zero points minus one, without g_idx (symmetric files)
    auto_round:gptqmodel   GPTQ's layout with zero points as they are
    auto_round:auto_awq    AWQ's layout (asymmetric files)
    auto_round             as gptqmodel (asymmetric files; symmetric ones are written as auto_gptq)
Source: auto-round 0.16, export/export_to_autoround/export.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.formats import awq
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts import gptq_codes as _gptq_codes
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.weights.canonical import Int4Weight

METHODS = ("auto-round", "intel/auto-round", "auto_round")


class AutoRound(Format):
    """`quant_method: auto-round`."""

    name = "auto_round"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By its method."""
        return config.get("quant_method") in METHODS

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Integer weights of 4 or 8 bits with float activations."""
        bits = _checks.choice(config, "bits", (4, 8))
        layout = _layout(config)
        if layout == "awq" and bits != 4:
            raise Int4Error(f"quantization_config.bits: {bits} is not served in AWQ's packing; accepted: 4")
        if config.get("data_type") is not None:
            _checks.choice(config, "data_type", ("int", "int_asym_dq", "int_sym"))
        for key in ("act_bits", "act_data_type"):
            value = config.get(key)
            if value is not None and value not in (16, 32, "float", "bf16", "fp16"):
                raise Int4Error(f"quantization_config.{key}: {value!r}: quantized activations are not served")
        if config.get("rotation_config"):
            raise Int4Error("quantization_config.rotation_config: rotated models are not served")
        size = _checks.group_size(config, "group_size", 128)
        mixed = bool(config.get("extra_config"))
        return Settings(bits, size, _checks.flag(config, "sym", True), layout, mixed=mixed)

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """The tensors of GPTQ or AWQ; g_idx is there when gptqmodel wrote the file."""
        return {"qweight": True, "qzeros": True, "scales": True} | (
            {} if settings.layout == "awq" else {"g_idx": False}
        )

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`."""
        if settings.layout == "awq":
            return awq.FORMAT.read(tensors, settings, shape=shape, name=name)
        return _gptq_codes.read(tensors, settings, minus_one=settings.layout == "v1", shape=shape, name=name)

    def holds(self, module: nn.Module) -> bool:
        """A pure torch linear of auto_round_extension."""
        owner = type(module).__module__
        return owner.startswith("auto_round_extension.torch.qlinear_torch") and hasattr(module, "qweight")

    def convert_module(self, module: nn.Module, *, name: str) -> Int4Weight | None:
        """See `Format.convert_module`. Such a linear keeps the tensors of the file as they are."""
        if not self.holds(module):
            return None
        tensors: dict[str, Any] = {key: getattr(module, key) for key in ("qweight", "qzeros", "scales")}
        _checks.on_cpu(tensors["qweight"], name)
        bits, size = getattr(module, "bits", None), getattr(module, "group_size", None)
        if bits not in (4, 8) or not isinstance(size, int):
            raise Int4Error(f"{name}: auto-round's linear with bits={bits!r} is not served; 4 and 8 are")
        rows, inputs = int(tensors["qweight"].shape[1]), int(tensors["qweight"].shape[0]) * 32 // bits
        layout = "v1" if type(module).__module__.endswith("qlinear_torch_zp") else "v2"
        settings = Settings(bits, -1 if size == inputs else size, False, layout)
        return self.read(tensors, settings, shape=(rows, inputs), name=name)


def _layout(config: Mapping[str, Any]) -> str:
    """ "v1", "v2" (of GPTQ's packing) or "awq"."""
    key = "packing_format" if config.get("packing_format") is not None else "backend"
    value = config.get(key) or "auto_round:auto_gptq"
    text = str(value).lower()
    if "awq" in text:
        return "awq"
    if "auto_gptq" in text:
        return "v1"
    if any(part in text for part in ("fp8", "nvfp", "mxfp", "marlin", "gguf")) or "round" not in text:
        raise Int4Error(f"quantization_config.{key}: {value!r} is not served; 'auto_round:auto_gptq' or ':auto_awq' is")
    return "v2"


FORMAT = AutoRound()
