"""GGUF tensors (llama.cpp): what lies on a grid that kernels have is taken over bit by bit, without rounding again.

`parts/gguf_blocks.py` has the types whose blocks do. The others (Q2_K, IQ1 ... IQ3, ternary) can only be expanded to
floats: `dense`.
Source: gguf-py 0.19, gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.formats.parts.gguf_blocks import BLOCKS, DECODERS
from torch_int4.weights.canonical import Int4Weight


class GgufBlocks(nn.Module):
    """A linear that stands for the blocks of a GGUF tensor until `patch` packs them.

    Attributes:
        weight: uint8 `[N, bytes per row]`, read anew each time where a function was given.
        kind: a type of `BLOCKS`.
        bias: float `[N]`, or None.
        nbytes: of the blocks.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, blocks: Tensor | Callable[[], Tensor], kind: str, shape: tuple[int, ...], bias: Any = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.kind = kind
        per_block, size = BLOCKS[kind]
        self.nbytes = self.out_features * (self.in_features // per_block) * size
        if isinstance(blocks, Tensor):
            self.register_buffer("weight", blocks)
        else:
            self._read = blocks
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "_read" in self.__dict__:
            return self._read()
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the expanded weight: slow, for what is left out of `patch`."""
        shape = (self.out_features, self.in_features)
        weight = FORMAT.read(
            {"weight": self.weight}, Settings(layout=self.kind), shape=shape, name="weight"
        ).dequantize()
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


class Gguf(Format):
    """One tensor is one linear: {"weight": uint8 [N, bytes per row]}, and `settings.layout` names its type."""

    name = "gguf"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Files have no config; transformers puts this one into models that it loaded from GGUF."""
        return config.get("quant_method") == "gguf"

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Each tensor of a file has its own type."""
        return Settings(4, 32, mixed=True)

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """The blocks."""
        return {"weight": True}

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`. `settings.layout` is a type of `BLOCKS`."""
        if settings.layout not in BLOCKS:
            raise Int4Error(
                f"{name}: the GGUF type {settings.layout or '(none)'} lies on no grid of kernels and has to be "
                f"expanded to floats; taken over as they are: {', '.join(BLOCKS)}"
            )
        rows, inputs = shape
        per_block, size = BLOCKS[settings.layout]
        if inputs % per_block:
            raise Int4Error(f"{name}: has {inputs} inputs, and {settings.layout} holds multiples of {per_block}")
        raw = _checks.take(tensors, "weight", name, (torch.uint8,), (rows, inputs // per_block * size))
        weight = DECODERS[settings.layout](raw.reshape(rows, -1, size))
        return _checks.serve(weight, f"{name} ({settings.layout})")

    def holds(self, module: nn.Module) -> bool:
        """`GgufBlocks`, and transformers' `GgufLinear`; both keep the blocks of the file."""
        if isinstance(module, GgufBlocks):
            return True
        known = type(module).__name__ == "GgufLinear" and type(module).__module__.startswith("transformers.")
        return known and isinstance(module.weight, Tensor) and module.weight.dtype == torch.uint8

    def convert_module(self, module: nn.Module, *, name: str) -> Int4Weight | None:
        """See `Format.convert_module`; None for types without a grid."""
        if not self.holds(module) or _kind_of(module, name) not in BLOCKS:
            return None
        weight: Any = module.weight
        _checks.on_cpu(weight, name)
        settings = Settings(layout=_kind_of(module, name))
        shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        result = self.read({"weight": weight}, settings, shape=shape, name=name)
        order = getattr(module, "input_permutation", None)
        if isinstance(order, Tensor):  # it gathers its input by this index, as `perm` does
            result.perm = order.long()
        return result.validate(name)

    def dense_module(self, module: nn.Module, *, name: str) -> Tensor | None:
        """fp32 `[N, K]` of such a linear, whatever its type."""
        if not self.holds(module):
            return None
        weight, order = module.weight, getattr(module, "input_permutation", None)
        assert isinstance(weight, Tensor)
        shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        values = dense(weight, _kind_of(module, name), shape, name)
        if not isinstance(order, Tensor):
            return values
        ordered = torch.empty_like(values)
        ordered[:, order.long()] = values
        return ordered


def dense(raw: Tensor, kind: str, shape: tuple[int, ...], name: str) -> Tensor:
    """fp32 values of a tensor of any GGUF type, by the package gguf.

    Args:
        raw: uint8, the tensor's bytes.
        kind: the type's name, as "Q6_K" or "F16".
        shape: of the result.
        name: the tensor, for messages.
    """
    gguf = require_gguf(name)
    quantized = getattr(gguf.GGMLQuantizationType, kind)
    per_block, size = gguf.GGML_QUANT_SIZES[quantized]
    count = 1
    for extent in shape:
        count *= extent
    if count % per_block or raw.numel() != count // per_block * size:
        raise Int4Error(f"{name}: holds {raw.numel()} bytes, and {list(shape)} values of {kind} take others")
    if kind == "BF16":
        values = raw.view(torch.bfloat16).float()
    else:
        blocks = raw.contiguous().reshape(-1, shape[-1] // per_block * size).numpy()
        if kind in ("F16", "F32", "F64"):
            blocks = blocks.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[kind])
        try:
            values = torch.from_numpy(gguf.quants.dequantize(blocks, quantized)).float()
        except NotImplementedError as error:
            raise Int4Error(f"{name}: the GGUF type {kind} is not read by the installed package gguf") from error
    if not bool(torch.isfinite(values).all()):
        raise Int4Error(f"{name}: holds NaN or infinity, so the file is damaged")
    return values.reshape(shape)


def require_gguf(name: str) -> Any:
    """The package gguf.

    Raises:
        Int4Error: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise Int4Error(f"{name}: reading GGUF needs the package gguf; run: pip install gguf") from error
    return gguf


def _kind_of(module: Any, name: str) -> str:
    if isinstance(module, GgufBlocks):
        return module.kind
    return str(require_gguf(name).GGMLQuantizationType(int(module.ggml_type)).name)


FORMAT = Gguf()
