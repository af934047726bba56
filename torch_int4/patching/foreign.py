"""Linears that another quantization backend has loaded: taken over from its tensors, without rounding again."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4 import formats, recipes
from torch_int4.config import Int4Config
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching import hooks as _hooks
from torch_int4.patching import scan as _scan
from torch_int4.patching.report import PatchedLinear, PatchReport
from torch_int4.weights.canonical import Int4Weight


@dataclass
class Foreign:
    """A module of another backend: its names, and the (parent, attribute) places that hold it."""

    names: list[str]
    places: list[tuple[nn.Module, str]]
    module: nn.Module | None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def find(model: nn.Module, config: Int4Config) -> list[Foreign]:
    """The linears of other backends that `config.skip` does not name."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[name] = module
        if not name or isinstance(module, Int4Linear) or not formats.holds(module):
            continue
        holder, _, attribute = name.rpartition(".")
        names[module].append(name)
        if (modules[holder], attribute) not in places[module]:
            places[module].append((modules[holder], attribute))
    chosen = [module for module in names if _scan.skip_pattern(config, names[module]) is None]
    return [Foreign(names[module], places[module], module) for module in chosen]


def convert(target: Foreign, config: Int4Config, report: PatchReport) -> None:
    """Put an `Int4Linear` into every place of a foreign module, and let go of it.

    Raises:
        Int4Error: naming the module, when its tensors are damaged or repacked for a kernel of its backend.
    """
    old = target.module
    assert old is not None
    before = sum(t.nbytes for t in (*old.parameters(recurse=False), *old.buffers(recurse=False)))
    weight = formats.convert_module(old, name=target.name)
    if weight is None:  # codes that no kernel has
        dense = formats.dense_module(old, name=target.name)
        assert dense is not None
        weight = recipes.get("rtn").quantize(dense, config.weights, bits=4, name=target.name)
    bias = getattr(old, "bias", None)
    dtype = _activation_dtype(old, bias)
    new = Int4Linear.from_weight(weight, _parameter(bias), compute=config.compute, dtype=dtype)
    _hooks.replace(old, new, target.places)
    target.module = None
    report.linears.append(_entry(target.name, weight, before, new.nbytes))


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
