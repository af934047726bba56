"""Makes `from_pretrained` know "torch_int4", without importing transformers, which takes seconds."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from ..config import Int4Config

WATCHED = "transformers.quantizers.auto"
OTHERS = "compressed-tensors"  # what we save says this, so that stock loaders read it


def install() -> None:
    """Register now if transformers' list of quantizers is loaded, else when it will be."""
    if WATCHED in sys.modules:
        _register(sys.modules[WATCHED])
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Sees one module being imported, and adds to it once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds the watched module as everyone else would, with a step after it."""
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


class _Int4:
    """Stands in transformers' table of configs for ours."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        from ._stored import parse

        return parse(config_dict)


def _quantizer(quantization_config: Int4Config, **kwargs: Any) -> Any:
    """Stands in transformers' table of quantizers for ours."""
    from .quantizer import Int4Quantizer

    return Int4Quantizer(quantization_config, **kwargs)


def _register(auto: Any) -> None:
    configs, quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    if Int4Config.quant_method in configs:
        return
    configs[Int4Config.quant_method] = _Int4
    quantizers[Int4Config.quant_method] = _quantizer
    stock = configs.get(OTHERS)

    class OursOrTheirs(_Int4):
        """compressed-tensors files that we wrote are ours, all others are left to the stock reader."""

        @classmethod
        def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
            if stock is None or Int4Config.quant_method in config_dict:
                return super().from_dict(config_dict)
            return stock.from_dict(config_dict, **kwargs)

    configs[OTHERS] = OursOrTheirs
