"""How a model is quantized: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch_int4.errors import Int4Error

COMPUTE = ("int8", "int8x2", "bf16", "fp32")
ZEROS = ("integer", "float")
HEADS = ("float", "int4", "int8")
EMBEDDINGS = ("float", "bf16")
KV_CACHES = ("auto", "fp32", "bf16", "fp16", "int8")
ATTENTIONS = ("fused", "stock")
# Fields that say how a model runs, and which linears are left; the others decide the bits of a quantized weight.
OF_RUNNING = ("compute", "head", "attention", "kv_cache", "embeddings", "skip")
PRESETS = ("light", "default", "best")
GROUP_SIZES = "a multiple of 32 up to 128, a multiple of 128 up to 1024, or -1 (one group per row)"


def is_group_size(value: Any) -> bool:
    """Whether kernels can serve groups of this many inputs."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    if value == -1:
        return True
    return (0 < value <= 128 and value % 32 == 0) or (128 < value <= 1024 and value % 128 == 0)


@dataclass(frozen=True)
class Int4Config:
    """How weights are quantized and how products are computed.

    Attributes:
        recipe: how codes are found; one of the files in `torch_int4/recipes`, or "transform+rounding", such as
            "awq+gptq". Most need calibration data, see `patch`.
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
        kv_cache: what that cache stores: "fp32", "bf16", "fp16", "int8" with a scale per token and head, or "auto":
            the model's dtype where it is 16 bits wide, bf16 where it is not.
        embeddings: "float" leaves input embeddings alone, "bf16" stores them in half the bytes of fp32.
        int8: `fnmatch` patterns of module names whose linears, with everything below them, are stored in int8.
        skip: `fnmatch` patterns of module names that stay in float, with everything below them.

    Raises:
        Int4Error: a value that is not accepted; the message names the field and what is.
    """

    recipe: str = "rtn"
    group_size: int = 32
    symmetric: bool = True
    zeros: str = "integer"
    clip: bool = False
    preset: str = "default"
    compute: str = "int8"
    head: str = "int8"
    attention: str = "fused"
    kv_cache: str = "auto"
    embeddings: str = "float"
    int8: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    # What transformers asks of a `quantization_config`; these are no fields.
    quant_method: ClassVar[str] = "torch_int4"
    stored: ClassVar[Any] = None  # set on instances that came with a checkpoint: how its files hold the weights

    def __post_init__(self) -> None:
        from torch_int4.recipes import parse  # here, because recipes import this module

        self._make_patterns("int8")
        self._make_patterns("skip")

        if not is_group_size(self.group_size):
            raise Int4Error(f"Int4Config.group_size must be {GROUP_SIZES}; got {self.group_size!r}")
        recipe = parse(self.recipe)
        self._check_choice("zeros", ZEROS)
        self._check_choice("compute", COMPUTE)
        self._check_choice("head", HEADS)
        self._check_choice("attention", ATTENTIONS)
        self._check_choice("kv_cache", KV_CACHES)
        self._check_choice("embeddings", EMBEDDINGS)
        self._check_choice("preset", PRESETS)
        for name in ("symmetric", "clip"):
            if not isinstance(getattr(self, name), bool):
                raise Int4Error(f"Int4Config.{name} must be True or False; got {getattr(self, name)!r}")
        recipe.check(self)

    def _make_patterns(self, name: str) -> None:
        value = getattr(self, name)
        patterns = (value,) if isinstance(value, str) else value
        if not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) for p in patterns):
            raise Int4Error(f"Int4Config.{name} must be a tuple of name patterns, got {value!r}")
        object.__setattr__(self, name, tuple(patterns))

    def _check_choice(self, name: str, accepted: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in accepted:
            choices = ", ".join(repr(choice) for choice in accepted)
            raise Int4Error(f"Int4Config.{name} must be one of {choices}; got {value!r}")

    @classmethod
    def with_overrides(cls, config: Int4Config | None = None, **overrides: Any) -> Int4Config:
        """`config` (or the default one) with some fields changed.

        Raises:
            Int4Error: `config` is of another type, a name is not a field, or a value is not accepted.
        """
        if config is not None and not isinstance(config, Int4Config):
            raise Int4Error(f"config must be an Int4Config or None; got {type(config).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = [name for name in overrides if name not in known]
        if unknown:
            raise Int4Error(f"unknown option {', '.join(unknown)}; the fields of Int4Config are {', '.join(known)}")
        return replace(config or cls(), **overrides)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the method as JSON knows them, for `config.json`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
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
