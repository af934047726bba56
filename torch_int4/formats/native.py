"""Our own form, for what no common format can express: float offsets, code books, permutations, shorter last groups.

Per linear of N outputs and K inputs, with G groups:
    int4_codes    uint8 [N, ceil(K/2)], even inputs in the low nibble; [N, K] when a code has 8 bits; when it has 5 or
                  6, the bits above the nibbles follow them (`weights/nibbles.py`)
    int4_scales   float16, bfloat16, float32 or uint8 [N, G]
    int4_zeros    uint8 [N, G], or
    int4_offsets  [N, G] in the scales' dtype; neither when symmetric
    int4_multipliers  uint8 [N, G, 2], or int8 [N, G] without offsets; scales and offsets are then float16 [N, K / 256]
    int4_perm     int64 [K], when columns are permuted
    int4_layout   int64 [5]: bits, group size, code book (0 none, else 1 + its place in `CODEBOOKS`), N, K
The meaning of each is that of `Int4Weight`; `CODEBOOKS` are the code books in the table of `weights/types.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.weights import nibbles
from torch_int4.weights.canonical import RECORD_INPUTS, SCALE_DTYPES, Int4Weight
from torch_int4.weights.types import BITS, CODEBOOKS

VERSION = 1
WITH_EXTRAS = 2  # of models whose linears have extras, which readers of version 1 would leave out
_EXTRAS = "extras"
_PREFIX = "int4_"
_OPTIONAL = ("zeros", "offsets", "multipliers", "perm")


class Native(Format):
    """`Int4Weight`, field by field."""

    name = "native"
    writes = True

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By its method and its format."""
        return config.get("quant_method") == "torch_int4" and config.get("format") == "native"

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Nothing but the version: every linear says of itself what it is."""
        version = config.get("version")
        if version not in (VERSION, WITH_EXTRAS):
            raise Int4Error(
                f"quantization_config.version: {version!r} is not read, only {VERSION} and {WITH_EXTRAS}; a newer "
                "torch_int4 wrote this"
            )
        return Settings(bits=4, group_size=32, mixed=True)

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """See the top of this file."""
        required = ("codes", "scales", "layout")
        return {_PREFIX + name: name in required for name in (*required, *_OPTIONAL)}

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`."""
        bits, size, book, rows, inputs = _layout(tensors, name)
        if (rows, inputs) != shape:
            raise Int4Error(f"{name}.int4_layout: says {[rows, inputs]}, but the model's linear is {list(shape)}")
        codes = _tensor(tensors, "codes", name, (torch.uint8,), (rows, nibbles.stored_columns(bits, inputs)))
        codes = nibbles.restored(codes, bits, inputs)
        groups = 1 if size == -1 else -(-inputs // size)
        fields: dict[str, Tensor] = {}
        each = groups  # groups of a scale
        if "int4_multipliers" in tensors:
            pairs = "int4_offsets" in tensors
            dtype, sizes = (torch.uint8, (rows, groups, 2)) if pairs else (torch.int8, (rows, groups))
            fields["multipliers"] = _tensor(tensors, "multipliers", name, (dtype,), sizes)
            each = inputs // RECORD_INPUTS
        scales = _tensor(tensors, "scales", name, SCALE_DTYPES, (rows, each))
        if "int4_zeros" in tensors:
            fields["zeros"] = _tensor(tensors, "zeros", name, (torch.uint8,), (rows, groups))
        if "int4_offsets" in tensors:
            fields["offsets"] = _tensor(tensors, "offsets", name, (scales.dtype,), (rows, each))
        if "int4_perm" in tensors:
            fields["perm"] = _tensor(tensors, "perm", name, (torch.int64,), (inputs,))
        codebook = CODEBOOKS[book - 1] if book else None
        return Int4Weight(codes, scales, group_size=size, bits=bits, codebook=codebook, **fields).validate(name)

    def write(self, weight: Int4Weight, settings: Settings, *, name: str) -> dict[str, Tensor]:
        """Every weight can be written."""
        weight.validate(name)
        codes = nibbles.stored(weight.codes, weight.bits)
        book = 0 if weight.codebook is None else 1 + CODEBOOKS.index(weight.codebook)
        layout = (weight.bits, weight.group_size, book, weight.out_features, weight.in_features)
        tensors = {"codes": codes, "scales": weight.scales, "layout": torch.tensor(layout)}
        for field in _OPTIONAL:
            if (value := getattr(weight, field)) is not None:
                tensors[field] = value
        return {_PREFIX + field: value.contiguous() for field, value in tensors.items()}

    def describe(self, written: Mapping[str, Settings], skipped: Iterable[str]) -> dict[str, Any]:
        """See `Format.describe`."""
        return {"quant_method": "torch_int4", "format": "native", "version": VERSION, "ignore": sorted(skipped)}

    def describe_extras(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """See `Format.describe_extras`."""
        return {"version": WITH_EXTRAS, _EXTRAS: dict(counts)}

    def extras(self, config: Mapping[str, Any]) -> dict[str, int]:
        """See `Format.extras`."""
        counts = config.get(_EXTRAS, {})
        usable = isinstance(counts, Mapping) and all(isinstance(n, int) and n > 0 for n in counts.values())
        if not usable or bool(counts) != (config.get("version") == WITH_EXTRAS):
            raise Int4Error(f"quantization_config.{_EXTRAS}: must say how many linears have each, got {counts!r}")
        return dict(counts)


def _layout(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    layout = tuple(int(value) for value in _tensor(tensors, "layout", name, (torch.int64,), (5,)).tolist())
    bits, size, book, rows, inputs = layout
    if bits not in BITS or not (size == -1 or 0 < size <= 1 << 20) or not 0 <= book <= len(CODEBOOKS):
        raise Int4Error(f"{name}.int4_layout: {list(layout)} is no bits, group size and code book")
    if rows < 1 or inputs < 1:
        raise Int4Error(f"{name}.int4_layout: says {[rows, inputs]}, which is no shape of a weight")
    return layout


def _tensor(
    tensors: Mapping[str, Tensor], field: str, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> Tensor:
    where = f"{name}.{_PREFIX}{field}"
    tensor = tensors.get(_PREFIX + field)
    if tensor is None:
        raise Int4Error(f"{where}: is missing in the checkpoint")
    if tensor.dtype not in dtypes:
        raise Int4Error(f"{where}: must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise Int4Error(f"{where}: must have shape {list(shape)}, got {list(tensor.shape)}")
    return tensor


FORMAT = Native()
