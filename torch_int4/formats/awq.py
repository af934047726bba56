"""AWQ files in gemm order (AutoAWQ, llm-awq's successors, GPTQModel's AWQ).

Per linear of N outputs and K inputs, with G groups:
    qweight  int32 [K, N/8]: codes of eight outputs in a word, in the order 0 2 4 6 1 3 5 7 from the low bits up
    qzeros   int32 [G, N/8]: zero points in the same order
    scales   float [G, N]
w = scale * (code - zero point). Source: AutoAWQ 0.2, modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.formats.parts import bits as _bits
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts import gptq_codes as _gptq_codes
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.weights.canonical import Int4Weight

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq(Format):
    """`quant_method: awq`."""

    name = "awq"
    writes = True

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By its method."""
        return config.get("quant_method") == "awq"

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Four bits in gemm order; the layouts of gemv, gemv_fast, marlin and llm-awq are refused."""
        bits = _checks.choice(config, "bits" if "bits" in config else "w_bit", (4,))
        layout = config.get("version") or config.get("format") or "gemm"
        if not isinstance(layout, str) or layout.lower() != "gemm":
            raise Int4Error(f"quantization_config.version: {layout!r} is not served; accepted: 'gemm'")
        size = _checks.group_size(config, "group_size" if "group_size" in config else "q_group_size", 128)
        skip = _checks.names(config, "modules_to_not_convert")
        return Settings(bits, size, not _checks.flag(config, "zero_point", True), "gemm", skip=skip)

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """Codes, zero points (also in symmetric files) and scales."""
        return {"qweight": True, "qzeros": True, "scales": True}

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`."""
        rows, inputs = shape
        if rows % 8:
            raise Int4Error(f"{name}: has {rows} outputs, and AWQ files hold multiples of 8")
        qweight = _checks.take(tensors, "qweight", name, (torch.int32,), (inputs, rows // 8))
        scales = _checks.floats(tensors, "scales", name)
        if scales.dim() != 2 or scales.shape[1] != rows or scales.shape[0] == 0:
            raise Int4Error(f"{name}.scales: must have shape [groups, {rows}], got {list(scales.shape)}")
        groups = scales.shape[0]
        size = _checks.groups_of(groups, inputs, settings.group_size, mixed=settings.mixed, name=f"{name}.scales")
        qzeros = _checks.take(tensors, "qzeros", name, (torch.int32,), (groups, rows // 8))
        zeros = _unpack(qzeros)
        weight = Int4Weight(
            _unpack(qweight),
            scales.t().contiguous(),
            zeros=None if bool((zeros == 8).all()) else zeros,
            group_size=size,
        )
        return _checks.serve(weight, name)

    def settings_for(self, weight: Int4Weight) -> Settings:
        """In gemm order."""
        return Settings(weight.bits, weight.group_size, weight.zeros is None and weight.offsets is None, "gemm")

    def write(self, weight: Int4Weight, settings: Settings, *, name: str) -> dict[str, Tensor]:
        """Four-bit integer grids with the inputs in order."""
        weight.validate(name)
        _gptq_codes.refuse_to_write(weight, name, "AWQ")
        if weight.bits != 4 or weight.perm is not None:
            reason = "has a permutation of its inputs (act-order)" if weight.perm is not None else "has 8 bits"
            raise Int4Error(f"{name}: {reason}, which AWQ files cannot express; write GPTQ or leave it in float")
        size = weight.in_features if weight.group_size == -1 else weight.group_size
        if weight.out_features % 8 or weight.in_features % size:
            sizes = f"{weight.out_features} x {weight.in_features}"
            raise Int4Error(f"{name}: is {sizes}; AWQ files hold multiples of 8 outputs and of {size} inputs")
        zeros = weight.zeros
        if zeros is None:
            zeros = torch.full(weight.scales.shape, 8, dtype=torch.uint8)
        return {"qweight": _pack(weight.codes), "qzeros": _pack(zeros), "scales": weight.scales.t().contiguous()}

    def describe(self, written: Mapping[str, Settings], skipped: Iterable[str]) -> dict[str, Any]:
        """One group size for all."""
        sizes = {settings.group_size for settings in written.values()}
        if len(sizes) != 1:
            raise Int4Error(f"AWQ files hold one group size, and there are {sorted(sizes)}; use compressed_tensors")
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": sizes.pop(),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": sorted(skipped) or None,
        }

    def holds(self, module: nn.Module) -> bool:
        """A linear of AutoAWQ's gemm kernels, or of gptqmodel's AWQ ones."""
        owner, kind = type(module).__module__.partition(".")[0], type(module).__name__
        tensors = (getattr(module, key, None) for key in ("qweight", "qzeros", "scales"))
        known = kind == "WQLinear_GEMM" or (owner == "gptqmodel" and "awq" in kind.lower())
        return known and all(isinstance(tensor, Tensor) for tensor in tensors)

    def convert_module(self, module: nn.Module, *, name: str) -> Int4Weight | None:
        """See `Format.convert_module`; only while the module still holds the tensors of the file."""
        if not self.holds(module):
            return None
        tensors: dict[str, Any] = {key: getattr(module, key) for key in ("qweight", "qzeros", "scales")}
        _checks.on_cpu(tensors["qweight"], name)
        rows, inputs = int(tensors["scales"].shape[-1]), int(module.in_features)  # type: ignore[arg-type]
        if tuple(tensors["qweight"].shape) != (inputs, rows // 8):
            kind = type(module).__name__
            raise Int4Error(
                f"{name}: {kind} has repacked its weight for its kernel; load the model with backend='torch'"
            )
        size = int(getattr(module, "group_size", -1))
        settings = Settings(4, -1 if size == inputs else size, False, "gemm")
        return self.read(tensors, settings, shape=(rows, inputs), name=name)


def _unpack(words: Tensor) -> Tensor:
    """int32 `[R, N/8]` to uint8 `[N, R]`."""
    values = _bits.unpack_words(words, 4).unflatten(1, (-1, 8))
    ordered = torch.empty_like(values)
    ordered[:, :, list(ORDER)] = values
    return ordered.flatten(1).t().contiguous()


def _pack(values: Tensor) -> Tensor:
    """uint8 `[N, R]` to int32 `[R, N/8]`."""
    ordered = values.t().contiguous().unflatten(1, (-1, 8))[:, :, list(ORDER)]
    return _bits.pack_words(ordered.flatten(1), 4)


FORMAT = Awq()
