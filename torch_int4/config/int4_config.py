"""Settings by which a model is quantized and run: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch_int4.config.run_options import RunOptions
from torch_int4.config.weight_options import WeightOptions
from torch_int4.errors import Int4Error


@dataclass(frozen=True)
class Int4Config(RunOptions, WeightOptions):  # in this order, so that the fields of weights come first
    """How weights are quantized (`WeightOptions`), and which of them, and how products are computed (`RunOptions`).

    Attributes:
        recipe: how codes are found; one of the files in `torch_int4/recipes`, or several joined by "+", of which one
            rounds, such as "awq+gptq". Most need calibration data, see `patch`.
        group_size: inputs that share a scale: a multiple of 32 up to 128, a multiple of 128 up to 1024, or -1
            for one group per row. A row need not be a multiple of it; the last group may be shorter.
        symmetric: codes around a fixed zero point (8), without an offset per group.
        zeros: offset per group when `symmetric=False`: "integer" (a zero point 0..15, w = s*(q - z)) or
            "float" (a minimum, w = s*q + m; takes over weights that came from GGUF Q4_1 bit by bit).
        clip: search per group for the clipping of the range with the least squared error: of the weights, or of the
            products where there is calibration data.
        preset: how long recipes train that train something: "light", "default" or "best".
        compute: arithmetic of the products. "int8" quantizes each row of the input; "int8x2" does so with
            about 15 bits; "bf16" and "fp32" dequantize the weights instead.
        head: the output projection onto the vocabulary: left in "float", or "int8" or "int4".
        attention: "fused" runs attention in our operators, over a managed KV cache; "stock" leaves it alone.
        kv_cache: the type of that cache: "fp32", "bf16", "fp16", "int8" with a scale per token and head, or "auto":
            the model's dtype where it is 16 bits wide, bf16 where it is not.
        embeddings: "float" leaves input embeddings alone, "bf16" stores them in half the bytes of fp32.
        int8: `fnmatch` patterns of module names whose linears, with everything below them, are stored in int8.
        skip: `fnmatch` patterns of module names that stay in float, with everything below them.

    Raises:
        Int4Error: a value that is not accepted; the message names the field and the values that are.
    """

    quant_method: ClassVar[str] = "torch_int4"  # transformers asks every `quantization_config` for it; no field

    def __post_init__(self) -> None:
        RunOptions.__post_init__(self)
        WeightOptions.__post_init__(self)

    @property
    def weights(self) -> WeightOptions:
        """The options that decide the bits of a quantized weight, without the others."""
        return WeightOptions(**{entry.name: getattr(self, entry.name) for entry in fields(WeightOptions)})

    @classmethod
    def with_overrides(cls, config: Int4Config | None = None, **overrides: Any) -> Int4Config:
        """`config` (or the default one) with some fields changed.

        Raises:
            Int4Error: `config` is of another type, a name is not a field, or a value is not accepted.
        """
        if config is not None and not isinstance(config, Int4Config):
            raise Int4Error(f"config must be an Int4Config or None; got {type(config).__name__}")
        known = [entry.name for entry in fields(Int4Config)]
        unknown = [name for name in overrides if name not in known]
        if unknown:
            raise Int4Error(f"unknown option {', '.join(unknown)}; the fields of Int4Config are {', '.join(known)}")
        return replace(config or cls(), **overrides)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the method as JSON knows them, for `config.json`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(Int4Config)}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return {"quant_method": self.quant_method, **values, **lists}

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`: defaults may change between versions, so they are written too."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """As `to_dict`, in text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Int4Config:
        """The config that `to_dict` described, with `kwargs` changed.

        Raises:
            Int4Error: the method is another one, a name is not a field, or a value is not accepted.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in config_dict.items()}
        method = values.pop("quant_method", cls.quant_method)
        if method != cls.quant_method:
            raise Int4Error(f"quant_method must be {cls.quant_method!r}, got {method!r}")
        return cls.with_overrides(None, **{**values, **kwargs})
