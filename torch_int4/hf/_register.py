"""Makes `from_pretrained` know "torch_int4", without importing transformers, which takes seconds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch_int4.config import Int4Config
from torch_int4.support.after_import import after_import

WATCHED = "transformers.quantizers.auto"
MODELS = "transformers.modeling_utils"
OTHERS = "compressed-tensors"  # what we save says this, so that stock loaders read it


def install() -> None:
    """Register now if transformers' list of quantizers is loaded, else when it will be."""
    after_import(WATCHED, _register)
    after_import(MODELS, _register_attention)


def _register_attention(module: Any) -> None:
    """Models that were patched in another process, and pickled there, ask for our attention by its name."""
    importlib.import_module("torch_int4.nn.attention_interface")


class _Int4:
    """Stands in transformers' table of configs for ours."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        from torch_int4.checkpoint.stored import parse

        return parse(config_dict)


def _quantizer(quantization_config: Int4Config, **kwargs: Any) -> Any:
    """Stands in transformers' table of quantizers for ours."""
    from torch_int4.hf.quantizer import Int4Quantizer

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
