"""MXFP4 (OCP Microscaling v1.0): E2M1 values in blocks of 32 inputs that share an exponent.

Two ways to store a linear of N outputs and K inputs; a byte's low half is the earlier input in both:
    compressed-tensors `mxfp4-pack-quantized`  weight_packed uint8 [N, K/2], weight_scale uint8 [N, K/32]
    gpt-oss (`quant_method: mxfp4`)            blocks uint8 [N, K/32, 16], scales uint8 [N, K/32]
w = 2^(scale - 127) * value[code], values 0 .5 1 1.5 2 3 4 6 and their negatives. gpt-oss keeps the experts of a layer
in one tensor with a leading dimension, of which `hf/_stacked.py` takes them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.weights import nibbles
from torch_int4.weights.canonical import Int4Weight

GROUP = 32
PACKED = "mxfp4-pack-quantized"


class Mxfp4(Format):
    """`quant_method: mxfp4`, and compressed-tensors' format of that name."""

    name = "mxfp4"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By its method, or the format within compressed-tensors."""
        method = config.get("quant_method")
        return method == "mxfp4" or (method == "compressed-tensors" and config.get("format") == PACKED)

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Nothing to choose: weights only."""
        if config.get("quant_method") == "mxfp4":
            return Settings(4, GROUP, layout="blocks", skip=_checks.names(config, "modules_to_not_convert"))
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise Int4Error("quantization_config.config_groups: must be a table with at least one group")
        for key, group in groups.items():
            where = f"quantization_config.config_groups.{key}"
            if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
                raise Int4Error(f"{where}.weights: must be a table of settings")
            if group.get("input_activations") is not None:
                raise Int4Error(f"{where}.input_activations: quantized activations are not served; use a W4A16 file")
            kind = (group["weights"].get("num_bits"), group["weights"].get("type"), group["weights"].get("group_size"))
            if kind != (4, "float", GROUP):
                raise Int4Error(f"{where}.weights: must be 4-bit floats in groups of 32, got {kind}")
        return Settings(4, GROUP, layout="packed", skip=_checks.names(config, "ignore"))

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """Codes and shared exponents."""
        if settings.layout == "packed":
            return {"weight_packed": True, "weight_scale": True}
        return {"blocks": True, "scales": True}

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`."""
        rows, inputs = shape
        if inputs % GROUP:
            raise Int4Error(f"{name}: has {inputs} inputs, and MXFP4 holds multiples of {GROUP}")
        codes, scales = self.suffixes(settings)
        layout = (rows, inputs // 2) if settings.layout == "packed" else (rows, inputs // GROUP, GROUP // 2)
        packed = _checks.take(tensors, codes, name, (torch.uint8,), layout)
        exponents = _checks.take(tensors, scales, name, (torch.uint8,), (rows, inputs // GROUP))
        if bool((exponents == 255).any()):
            raise Int4Error(f"{name}.{scales}: holds NaN (255), so the checkpoint is damaged")
        values = nibbles.split(packed.reshape(rows, -1))
        return _checks.serve(Int4Weight(values, exponents.contiguous(), group_size=GROUP, codebook="fp4"), name)


FORMAT = Mxfp4()
