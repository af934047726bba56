"""GPTQ files of AutoGPTQ, GPTQModel, optimum and llm-compressor's older exports; versions 1 and 2, with act-order.

The layout is that of `_gptq_codes`. Version 1 (`format` or `checkpoint_format` "gptq", or nothing) stores zero points
minus one, version 2 ("gptq_v2") as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts import gptq_codes as _gptq_codes
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.weights.canonical import Int4Weight

KEYS = ("qweight", "qzeros", "scales", "g_idx")
OWNERS = ("gptqmodel", "auto_gptq")
VERSIONS = {"gptq": "v1", "gptq_v2": "v2"}


class Gptq(Format):
    """`quant_method: gptq`."""

    name = "gptq"
    writes = True

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By its method."""
        return config.get("quant_method") == "gptq"

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Bits 4 and 8. Marlin's and other kernels' own layouts are refused."""
        bits = _checks.choice(config, "bits", (4, 8))
        key = "checkpoint_format" if config.get("checkpoint_format") is not None else "format"
        version = VERSIONS[_checks.choice(config, key, tuple(VERSIONS), "gptq")]
        _checks.choice(config, "pack_dtype", ("int32", None), None)
        if config.get("is_marlin_format"):
            raise Int4Error("quantization_config.is_marlin_format: that kernel's own layout is not served")
        return Settings(
            bits,
            _checks.group_size(config, "group_size", 128),
            _checks.flag(config, "sym", True),
            version,
            _checks.flag(config, "desc_act", False),
            mixed=bool(config.get("dynamic")),
        )

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """Codes, zero points, scales; and the group of each input where columns were ordered by activation."""
        return {"qweight": True, "qzeros": True, "scales": True, "g_idx": settings.act_order}

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`."""
        return _gptq_codes.read(tensors, settings, minus_one=settings.layout != "v2", shape=shape, name=name)

    def settings_for(self, weight: Int4Weight) -> Settings:
        """Version 1, which every reader of GPTQ files knows."""
        symmetric = weight.zeros is None and weight.offsets is None
        return Settings(weight.bits, weight.group_size, symmetric, "v1", weight.perm is not None)

    def write(self, weight: Int4Weight, settings: Settings, *, name: str) -> dict[str, Tensor]:
        """Integer grids of 4 or 8 bits, in any order of the inputs."""
        return _gptq_codes.write(weight, minus_one=settings.layout != "v2", name=name)

    def describe(self, written: Mapping[str, Settings], skipped: Iterable[str]) -> dict[str, Any]:
        """The commonest kind of weight, and rules for the modules that have another one or stayed in float."""
        kinds = list(written.values())
        main = max(kinds, key=lambda kind: sum((k.bits, k.group_size) == (kind.bits, kind.group_size) for k in kinds))
        if any(kind.layout != main.layout for kind in kinds):
            raise Int4Error("GPTQ files hold one version; write every linear with the same Settings.layout")
        dynamic: dict[str, Any] = {}
        for module, kind in written.items():
            if (kind.bits, kind.group_size) != (main.bits, main.group_size):
                dynamic["+:^" + _literal(module) + "$"] = {"bits": kind.bits, "group_size": kind.group_size}
        dynamic |= {"-:^" + _literal(module) + "$": {} for module in skipped}
        config = {
            "quant_method": "gptq",
            "bits": main.bits,
            "group_size": main.group_size,
            "sym": all(kind.symmetric for kind in kinds),
            "desc_act": any(kind.act_order for kind in kinds),
            "checkpoint_format": "gptq_v2" if main.layout == "v2" else "gptq",
            "pack_dtype": "int32",
        }
        return config | ({"dynamic": dynamic} if dynamic else {})

    def holds(self, module: nn.Module) -> bool:
        """A linear of gptqmodel or auto_gptq, but for their AWQ ones."""
        owner, kind = type(module).__module__.partition(".")[0], type(module).__name__.lower()
        tensors = (getattr(module, key, None) for key in ("qweight", "qzeros", "scales"))
        return owner in OWNERS and "awq" not in kind and all(isinstance(tensor, Tensor) for tensor in tensors)

    def convert_module(self, module: nn.Module, *, name: str) -> Int4Weight | None:
        """See `Format.convert_module`; only while the module still holds the tensors of the file.

        gptqmodel's `qzero_format()` says whether the zero points have been turned into version 2 already.
        """
        if not self.holds(module):
            return None
        tensors = {
            key: value for key in KEYS if isinstance(value := getattr(module, key, None), Tensor) and value.numel()
        }
        _checks.on_cpu(tensors["qweight"], name)
        bits, size = getattr(module, "bits", None), getattr(module, "group_size", None)
        if bits not in (4, 8) or not isinstance(size, int):
            raise Int4Error(f"{name}: {type(module).__name__} with bits={bits!r} and group_size={size!r} is not served")
        shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        version = getattr(module, "qzero_format", None)
        layout = "v2" if callable(version) and version() == 2 else "v1"
        settings = Settings(bits, -1 if size == shape[1] else size, False, layout)
        return self.read(tensors, settings, shape=shape, name=name)


def _literal(module: str) -> str:
    """A regular expression that matches this name only."""
    return module.replace(".", "\\.")


FORMAT = Gptq()
