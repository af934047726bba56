"""Linears that another quantization backend has loaded: taken over from its tensors, without rounding again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_int4 import formats, recipes
from torch_int4.config import Int4Config
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching import hooks as _hooks
from torch_int4.patching import scan as _scan
from torch_int4.patching.plan import Foreign
from torch_int4.patching.report import PatchedLinear, PatchReport
from torch_int4.weights.canonical import Int4Weight
from torch_int4.weights.packed import Memory, PackedWeight
from torch_int4.weights.types import INT4


def convert(target: Foreign, config: Int4Config, report: PatchReport, memory: Memory) -> None:
    """Put an `Int4Linear` into every place of a foreign module, packed into `memory`, and let go of the module.

    Raises:
        Int4Error: naming the module, when its tensors are damaged or repacked for a kernel of its backend.
    """
    old = target.module
    assert old is not None
    before = sum(t.nbytes for t in (*old.parameters(recurse=False), *old.buffers(recurse=False)))
    before += 0 if before else int(getattr(old, "nbytes", 0))  # of what is still in its file
    weight = formats.convert_module(old, name=target.name)
    if weight is None:  # codes that no kernel has
        dense = formats.dense_module(old, name=target.name)
        assert dense is not None
        weight = recipes.get("rtn").quantize(dense, config.weights, bits=INT4.bits, name=target.name)
    bias = getattr(old, "bias", None)
    dtype = _activation_dtype(old, bias)
    packed = PackedWeight.pack(weight, memory)
    new = Int4Linear(packed, _parameter(bias), compute=config.compute, dtype=dtype)
    entry = _entry(target.name, weight, before, new.nbytes)
    _hooks.replace(old, new, target.places)
    target.module = None
    report.linears.append(entry)


def forget_backend(model: nn.Module) -> None:
    """Drop what transformers remembers of the backend, once none of its linears is left."""
    if any(formats.holds(module) for module in model.modules()):
        return
    for name in formats.available():
        formats.get(name).release(model)
    config: Any = getattr(model, "config", None)
    for holder, name in ((config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if holder is not None and name in getattr(holder, "__dict__", {}):
            delattr(holder, name)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized_training_enabled"):
        if name in model.__dict__:
            setattr(model, name, False)


def _parameter(bias: Any) -> nn.Parameter | None:
    """Some backends keep a bias as a buffer."""
    if not isinstance(bias, Tensor) or bias.numel() == 0:
        return None
    return bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone(), requires_grad=False)


def _activation_dtype(module: nn.Module, bias: Any) -> torch.dtype:
    for value in (getattr(module, "compute_dtype", None), getattr(bias, "dtype", None)):
        if isinstance(value, torch.dtype) and value in _scan.FLOATS:
            return value
    return torch.float32


def _entry(name: str, weight: Int4Weight, before: int, after: int) -> PatchedLinear:
    return PatchedLinear(name, weight.out_features, weight.in_features, weight.bits, before, after)
