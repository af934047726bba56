"""What a loader needs to know of a model whose weights are not there yet, and the place it keeps for each of them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from torch_int4.config import Int4Config
from torch_int4.nn.extended import extras_of
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching import families
from torch_int4.patching import scan as _scan
from torch_int4.patching import ties as _ties
from torch_int4.patching.report import PatchedLinear


class PendingLinear(nn.Module):
    """Stands for a linear, on the meta device, until its int4 weight is there. It has no float weight to be loaded.

    The buffer only says how many bytes the packed weight will take, for those who plan memory.
    """

    def __init__(self, name: str, old: nn.Module, bits: int) -> None:
        super().__init__()
        weight, bias = old.weight, old.bias
        assert isinstance(weight, torch.Tensor)
        self.name, self.bits, self.dtype = name, bits, weight.dtype
        self.transposed = _scan.is_conv1d(old)
        rows, inputs = reversed(weight.shape) if self.transposed else weight.shape
        self.out_features, self.in_features = int(rows), int(inputs)
        self.weight = torch.empty(0)  # no parameter: for code that initializes what a checkpoint lacks
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        nbytes = self.out_features * self.in_features * (bits + 0.5) / 8
        self.register_buffer("packed", torch.empty(int(nbytes), dtype=torch.uint8, device="meta"), persistent=False)
        self.train(old.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.out_features, self.in_features

    def entry(self, made: Int4Linear) -> PatchedLinear:
        """The line of a report about the linear that took this place."""
        rows, inputs = self.shape
        bits = 8 if made.weight_type == "int8" else 4
        before = rows * inputs * self.dtype.itemsize
        return PatchedLinear(self.name, rows, inputs, bits, before, made.nbytes, extras=tuple(extras_of(made)))


def find_loadable(model: nn.Module, config: Int4Config) -> dict[str, int]:
    """{name: bits} of the linears that can become int4 one by one while a model on the meta device is loaded.

    Left out, for `patch` to judge once there are values: linears that stay in float, weights that several modules
    hold, and linears whose forward is not a plain product.
    """
    by_module = families.of_modules(model, None)
    head = _scan.find_head(model, by_module[id(model)])
    names, places = _scan._linears(model)
    users = _scan.parameter_users(model)
    tied = _tied_parameters(model)
    found = {}
    for module, called in names.items():
        name, weight = called[0], module._parameters.get("weight")
        if len(called) > 1 or len(places[module]) > 1 or weight is None or f"{name}.weight" in tied:
            continue
        if _scan._reason_to_skip(module, called, places[module], config, module is head) is not None:
            continue
        if weight.dtype in _scan.FLOATS and len(users[id(weight)]) == 1 and computes_product(module):
            found[name] = _scan.bits_of(called, config, module is head)
    return found


def all_linears(model: nn.Module) -> list[str]:
    """Names of every linear that is not int4; of one with several names, the first."""
    names, _ = _scan._linears(model)
    return [called[0] for called in names.values()]


def leave_floats(model: nn.Module, config: Int4Config) -> Int4Config:
    """A config that skips every linear which is in float now, but for the head where the config wants it quantized."""
    by_module = families.of_modules(model, None)
    head = _scan.find_head(model, by_module[id(model)])
    names, _ = _scan._linears(model)
    left = [name for module, called in names.items() if module is not head or config.head == "float" for name in called]
    return _skipping(config, left)


def leave_hooked(model: nn.Module, config: Int4Config) -> Int4Config:
    """A config that skips the linears whose float weights accelerate keeps elsewhere."""
    names, _ = _scan._linears(model)
    return _skipping(config, [name for m, called in names.items() if hasattr(m, "_hf_hook") for name in called])


def _skipping(config: Int4Config, names: list[str]) -> Int4Config:
    new = tuple(name for name in names if _scan.skip_pattern(config, [name]) is None)
    return dataclasses.replace(config, skip=(*config.skip, *new)) if new else config


def put_pending(model: nn.Module, bits: dict[str, int]) -> dict[str, PendingLinear]:
    """Put a `PendingLinear` into the place of each named linear, and forget what tied it to other weights."""
    ties = _ties.record(model)
    pending = {}
    for name, count in bits.items():
        pending[name] = PendingLinear(name, model.get_submodule(name), count)
        replace(model, name, pending[name])
    _ties.forget(model, ties, set(bits))
    return pending


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module into the place of that name."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def computes_product(module: nn.Module) -> bool:
    """Whether a linear without values computes x @ W.T + b: tried on a small copy of it that has some."""
    if "forward" in module.__dict__:
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    probe: Any = copy.copy(module)
    rows, inputs = 3, 5
    shape = (inputs, rows) if _scan.is_conv1d(module) else (rows, inputs)
    generator = torch.Generator().manual_seed(0)
    probe._parameters = dict(module._parameters)
    probe._parameters["weight"] = nn.Parameter(torch.randn(shape, generator=generator))
    if module._parameters.get("bias") is not None:
        probe._parameters["bias"] = nn.Parameter(torch.randn(rows, generator=generator))
    for name, size in (("in_features", inputs), ("nx", inputs), ("out_features", rows), ("nf", rows)):
        if name in module.__dict__:
            probe.__dict__[name] = size
    return _scan._is_product(probe, probe.weight)


def _tied_parameters(model: nn.Module) -> set[str]:
    tied: set[str] = set()
    for name, module in model.named_modules():
        expanded = getattr(module, _ties.EXPANDED, None)
        if isinstance(expanded, dict):
            prefix = name + "." if name else ""
            tied.update(prefix + key for pair in expanded.items() for key in pair)
    return tied
