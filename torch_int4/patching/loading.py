"""The plan of a model whose weights are not there yet, for a loader, and the place it keeps for each of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torch_int4.config import Int4Config
from torch_int4.nn.dense import is_conv1d
from torch_int4.nn.extended import extras_of
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching import scan as _scan
from torch_int4.patching import ties as _ties
from torch_int4.patching.kept_in_fp32 import is_kept
from torch_int4.patching.plan import Survey
from torch_int4.patching.report import PatchedLinear
from torch_int4.weights.types import WeightType


class PendingLinear(nn.Module):
    """Stands for a linear, on the meta device, until its int4 weight is there. It has no float weight to be loaded.

    The buffer only says how many bytes the packed weight will take, for those who plan memory.
    """

    def __init__(self, name: str, old: nn.Module, kind: WeightType, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        weight, bias = old.weight, old.bias
        assert isinstance(weight, torch.Tensor)
        self.name, self.kind, self.dtype = name, kind, dtype or weight.dtype
        self.transposed = is_conv1d(old)
        rows, inputs = reversed(weight.shape) if self.transposed else weight.shape
        self.out_features, self.in_features = int(rows), int(inputs)
        # No parameter, and without values: for code that initializes what a checkpoint lacks, some of it by shape.
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        nbytes = self.out_features * self.in_features * (kind.bits + 0.5) / 8
        self.register_buffer("packed", torch.empty(int(nbytes), dtype=torch.uint8, device="meta"), persistent=False)
        self.train(old.training)

    def reset_parameters(self) -> None:
        """Does nothing: for code that initializes what a checkpoint lacks."""

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.out_features, self.in_features

    def entry(self, made: Int4Linear) -> PatchedLinear:
        """The line of a report about the linear that took this place."""
        rows, inputs = self.shape
        bits, before = made.packed_weight.type.bits, rows * inputs * self.dtype.itemsize
        return PatchedLinear(self.name, rows, inputs, bits, before, made.nbytes, extras=tuple(extras_of(made)))


def find_loadable(survey: Survey, config: Int4Config) -> dict[str, WeightType]:
    """{name: type} of the linears that can become int4 one by one while a model on the meta device is loaded.

    Left out, for `decide` to judge once there are values: linears that stay in float, weights that several modules
    hold, and linears whose forward is not a plain product.
    """
    users = _scan.parameter_users(survey.model)
    tied = _tied_parameters(survey.model)
    found = {}
    for module, held in survey.linears.items():
        weight, is_head = module._parameters.get("weight"), module is survey.head
        if len(held.names) > 1 or len(held.places) > 1 or weight is None or f"{held.name}.weight" in tied:
            continue
        if survey.reason_to_skip(module, config) is not None:
            continue
        if weight.dtype in _scan.FLOATS and len(users[id(weight)]) == 1 and computes_product(module):
            found[held.name] = _scan.type_of(held.names, config, is_head)
    return found


def leave_floats(survey: Survey, config: Int4Config) -> Int4Config:
    """A config that skips every linear which is in float now, but for the head where the config wants it quantized."""
    left = [
        name
        for module, held in survey.linears.items()
        if module is not survey.head or config.head == "float"
        for name in held.names
    ]
    return _skipping(config, left)


def leave_hooked(survey: Survey, config: Int4Config) -> Int4Config:
    """A config that skips the linears whose float weights accelerate keeps elsewhere."""
    hooked = [held for module, held in survey.linears.items() if hasattr(module, "_hf_hook")]
    return _skipping(config, [name for held in hooked for name in held.names])


def _skipping(config: Int4Config, names: list[str]) -> Int4Config:
    new = tuple(name for name in names if _scan.skip_pattern(config, [name]) is None)
    return dataclasses.replace(config, skip=(*config.skip, *new)) if new else config


def put_pending(survey: Survey, kinds: Mapping[str, WeightType]) -> dict[str, PendingLinear]:
    """Put a `PendingLinear` into the place of each named linear, and forget what tied it to other weights.

    The linears leave the survey.

    Returns:
        {name: the placeholder}, in the order of the model.
    """
    model = survey.model
    ties = _ties.record(model)
    pending = {}
    for module, held in list(survey.linears.items()):
        if held.name in kinds:
            weight: Any = module.weight
            dtype = torch.float32 if is_kept(model, held.name, weight.dtype) else weight.dtype
            pending[held.name] = PendingLinear(held.name, module, kinds[held.name], dtype)
            replace(model, held.name, pending[held.name])
            del survey.linears[module]
    _ties.forget(model, ties, set(pending))
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
    shape = (inputs, rows) if is_conv1d(module) else (rows, inputs)
    generator = torch.Generator().manual_seed(0)
    probe._parameters = dict(module._parameters)
    probe._parameters["weight"] = nn.Parameter(torch.randn(shape, generator=generator))
    if module._parameters.get("bias") is not None:
        probe._parameters["bias"] = nn.Parameter(torch.randn(rows, generator=generator))
    for name, size in (("in_features", inputs), ("nx", inputs), ("out_features", rows), ("nf", rows)):
        if name in module.__dict__:
            probe.__dict__[name] = size
    return _scan.is_product(probe, probe.weight)


def _tied_parameters(model: nn.Module) -> set[str]:
    tied: set[str] = set()
    for name, module in model.named_modules():
        expanded = getattr(module, _ties.EXPANDED, None)
        if isinstance(expanded, dict):
            prefix = name + "." if name else ""
            tied.update(prefix + key for pair in expanded.items() for key in pair)
    return tied
