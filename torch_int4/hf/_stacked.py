"""Checkpoints that hold the experts of a layer in one tensor, read as if each expert had tensors of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from torch_int4.formats.parts.files import Checkpoint
from torch_int4.hf._keys import PARTS, Names
from torch_int4.layouts.experts import ExpertsLayout

# What follows the name of a tensor of all experts, and what a linear calls that: floats, and the MXFP4 of gpt-oss.
SUFFIXES = {"": "weight", "_bias": "bias", "_blocks": "blocks", "_scales": "scales"}
_STACK = re.compile(r"(?P<module>.+)\.(?P<stack>gate_up_proj|up_proj|down_proj)(?P<suffix>_bias|_blocks|_scales|)")


class Part(NamedTuple):
    """A linear's part of a tensor of all experts.

    Attributes:
        key: of that tensor.
        expert: its place along the first dimension.
        rows: of the outputs of the tensor that are those of the linear.
        transposed: whether outputs are the last dimension, and become the first.
    """

    key: str
    expert: int
    rows: slice
    transposed: bool


class StackedCheckpoint(Checkpoint):
    """A checkpoint with the tensors of single experts in the place of those of all.

    Args:
        source: the checkpoint; this takes its files over.
        parts: {name of a tensor of one expert: its part of a tensor}.
    """

    def __init__(self, source: Checkpoint, parts: dict[str, Part]) -> None:
        self.__dict__.update(source.__dict__)
        self._parts = parts
        self._stacks = {part.key for part in parts.values()}

    def __contains__(self, key: object) -> bool:
        return key in self._parts or (super().__contains__(key) and key not in self._stacks)

    def __iter__(self) -> Iterator[str]:
        yield from (key for key in super().__iter__() if key not in self._stacks)
        yield from self._parts

    def __len__(self) -> int:
        return super().__len__() - len(self._stacks) + len(self._parts)

    def file(self, key: str) -> str:
        """See `Checkpoint`."""
        return super().file(self.stored_name(key))

    def shape(self, key: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        part = self._parts.get(key)
        if part is None:
            return super().shape(key)
        shape = super().shape(part.key)[1:]
        shape = shape[::-1] if part.transposed else shape
        return (len(range(*part.rows.indices(shape[0]))), *shape[1:])

    def read(self, key: str, part: int | None = None) -> Tensor:
        """See `Checkpoint`."""
        place = self._parts.get(key)
        if place is None:
            return super().read(key, part)
        values = super().read(place.key, place.expert)
        return (values.t() if place.transposed else values)[place.rows].contiguous()

    def stored_name(self, key: str) -> str:
        """See `Checkpoint`."""
        part = self._parts.get(key)
        return key if part is None else part.key


def stacks(source: Checkpoint, names: Names) -> dict[str, dict[str, str]]:
    """{experts module of the model: {tensor of all its experts: its name in the checkpoint}}.

    Modules are left out where the checkpoint has a stack without the other.
    """
    found: dict[str, dict[str, str]] = {}
    for key in source:
        match = _STACK.fullmatch(names.target(key) or key)
        if match is not None and names.has_experts(match["module"]):
            found.setdefault(match["module"], {})[match["stack"] + match["suffix"]] = key
    return {module: tensors for module, tensors in found.items() if _are_whole(tensors)}


def _are_whole(tensors: dict[str, str]) -> bool:
    return any(
        f"down_proj{suffix}" in tensors and not tensors.keys().isdisjoint((f"gate_up_proj{suffix}", f"up_proj{suffix}"))
        for suffix in ("", "_blocks")
    )


def unstacked(source: Checkpoint, model: Any, found: dict[str, dict[str, str]]) -> Checkpoint:
    """The checkpoint as its model, whose experts of these modules are linears now, has its tensors."""
    parts: dict[str, Part] = {}
    for module, tensors in found.items():
        experts = model.get_submodule(module)
        layout: ExpertsLayout = experts.torch_int4_data
        for name, key in tensors.items():
            match = re.fullmatch(r"(gate_up_proj|up_proj|down_proj)(.*)", name)
            assert match is not None
            transposed = bool(experts.is_transposed) and match[2] == ""
            for linear in PARTS[match[1]]:
                rows = (
                    _rows(source.shape(key), linear, layout, transposed) if match[1] == "gate_up_proj" else slice(None)
                )
                for number in range(layout.count):
                    parts[f"{module}.{number}.{linear}.{SUFFIXES[match[2]]}"] = Part(key, number, rows, transposed)
    return StackedCheckpoint(source, parts) if parts else source


def _rows(shape: tuple[int, ...], linear: str, layout: ExpertsLayout, transposed: bool) -> slice:
    """The outputs of gate or of up among those of both."""
    is_up = linear == "up_proj"
    if not layout.concatenated:
        return slice(int(is_up), None, 2)
    inner = shape[-1 if transposed else 1] // 2
    return slice(inner, None) if is_up else slice(inner)
