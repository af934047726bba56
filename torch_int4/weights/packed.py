"""`PackedWeight`: one weight as kernels read it, the mirror of the struct in csrc/kernels/kernel.h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_int4 import _C
from torch_int4.errors import Int4Error
from torch_int4.weights import types
from torch_int4.weights.canonical import RECORD_INPUTS, RECORDS, Int4Weight, Records

FIELDS = ("packed", "packed_scales", "packed_offsets", "perm")  # of modules that hold the tensors, and of files
SCALE_DTYPES = (torch.float16, torch.float32, torch.uint8)
OFFSET_DTYPES = (torch.uint8, torch.float16, torch.float32)
# Hands out memory for a tensor of that shape and type, which is written once, completely.
Memory = Callable[[tuple[int, ...], torch.dtype], Tensor]


def codes_shape(out_features: int, in_features: int, weight_type: str) -> tuple[int, int, int]:
    """(panels, lines, bytes of a line) of the packed codes of a weight."""
    panel_bytes = _padded(in_features) // _C.SLAB * types.named(weight_type).slab_bytes
    return -(-out_features // _C.PANEL_ROWS), panel_bytes // _C.LINE_BYTES, _C.LINE_BYTES


def stream_shape(out_features: int, in_features: int, group_size: int) -> tuple[int, int, int]:
    """(panels, groups, rows of a panel) of the packed scales, and of the packed offsets."""
    return -(-out_features // _C.PANEL_ROWS), groups_of(in_features, group_size), _C.PANEL_ROWS


def records_shape(out_features: int, in_features: int, kind: Records) -> tuple[int, int, int]:
    """(panels, records, bytes of a record) of packed scales that have two levels."""
    return -(-out_features // _C.PANEL_ROWS), in_features // RECORD_INPUTS, kind.nbytes


def records_of(scales: Tensor) -> Records | None:
    """The kind of such scales; None of others."""
    if scales.dtype != torch.uint8 or scales.dim() != 3:
        return None
    return next((kind for kind in RECORDS if kind.nbytes == scales.shape[2]), None)


def groups_of(in_features: int, group_size: int) -> int:
    """Groups of a row of a packed weight; -1 is one group per row."""
    padded = _padded(in_features)
    return 1 if group_size == -1 else -(-padded // min(group_size, padded))


def _padded(in_features: int) -> int:
    return -(-in_features // _C.SLAB) * _C.SLAB


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The tensors and sizes of a packed weight of N outputs and K inputs.

    Attributes:
        packed: uint8 `[panels, lines, 64]`, the codes of 16 rows in each panel.
        scales: float16, float32 or uint8 (powers of two, E8M0) `[panels, groups, 16]`; or, of two levels, uint8
            `[panels, K / 256, bytes of a record]`, see `RECORDS`.
        offsets: uint8 zero points or floats of the scales' type, shaped as they are; None for a symmetric weight, and
            where the scales hold them.
        perm: int64 `[K]` or None. Column k of the codes belongs to column `perm[k]` of the input.
        out_features: N.
        in_features: K.
        group_size: inputs per group, or -1 for one group per row.
        weight_type: the name of a row of the table in `weights/types.py`.
    """

    packed: Tensor
    scales: Tensor
    offsets: Tensor | None
    perm: Tensor | None
    out_features: int
    in_features: int
    group_size: int
    weight_type: str

    @classmethod
    def pack(cls, weight: Int4Weight, memory: Memory | None = None) -> PackedWeight:
        """Packs a canonical weight, by default into memory of its own.

        Args:
            weight: valid; its tensors are read, and `perm` is taken over.
            memory: where the packed tensors go.

        Raises:
            RuntimeError: kernels have no such groups, or codes are larger than the type has.
        """
        scales, offsets = weight.scales, weight.offsets
        if scales.dtype == torch.bfloat16:  # kernels read fp16 and fp32; fp32 keeps every bfloat16
            scales, offsets = scales.float(), None if offsets is None else offsets.float()
        rows, inputs = weight.codes.shape
        name, size = weight.type.name, weight.group_size
        given = [None if t is None else t.contiguous() for t in (weight.codes, scales, weight.zeros, offsets)]
        multipliers = None if weight.multipliers is None else weight.multipliers.contiguous()
        options = {"group_size": size, "weight_type": name, "multipliers": multipliers}
        if memory is None:
            packed, scales, offsets = torch.ops.torch_int4.pack(*given, **options)
            offsets = offsets if offsets.numel() else None
        else:
            stream, added = stream_shape(rows, inputs, size), weight.zeros if offsets is None else offsets
            packed = memory(codes_shape(rows, inputs, name), torch.uint8)
            if weight.records is not None:
                scales, offsets = memory(records_shape(rows, inputs, weight.records), torch.uint8), None
            else:
                scales = memory(stream, scales.dtype)
                offsets = None if added is None else memory(stream, added.dtype)
            torch.ops.torch_int4.pack_into(*given, packed, scales, offsets, **options)
        return cls(packed, scales, offsets, weight.perm, rows, inputs, size, name)

    @property
    def type(self) -> types.WeightType:
        """The row of the table of types."""
        return types.named(self.weight_type)

    @property
    def offset_kind(self) -> str | None:
        """None of a symmetric weight, "integer" of one with zero points, or "float"."""
        if self.offsets is None:
            records = records_of(self.scales)
            return "float" if records is not None and records.has_offsets else None
        return "integer" if self.offsets.dtype == torch.uint8 else "float"

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.tensors().values() if t is not None)

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors, by the names of `FIELDS`."""
        return dict(zip(FIELDS, (self.packed, self.scales, self.offsets, self.perm), strict=True))

    def check(self) -> PackedWeight:
        """Whether the tensors are a packed weight of these sizes; returns self.

        Raises:
            Int4Error: naming the tensor that is not, or the type that is none.
        """
        stream = stream_shape(self.out_features, self.in_features, self.group_size)
        codes = codes_shape(self.out_features, self.in_features, self.weight_type)
        records = records_of(self.scales) if isinstance(self.scales, Tensor) else None
        wanted = (
            ((torch.uint8,), codes),
            ((torch.uint8,), records_shape(self.out_features, self.in_features, records))
            if records is not None
            else (SCALE_DTYPES, stream),
            (OFFSET_DTYPES, stream),
            ((torch.int64,), (self.in_features,)),
        )
        for (name, tensor), (dtypes, shape) in zip(self.tensors().items(), wanted, strict=True):
            if tensor is None and name in ("packed_offsets", "perm"):
                continue
            if tensor is None or tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
                got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise Int4Error(f"{name} must be {' or '.join(map(str, dtypes))} {list(shape)}, got {got}")
        return self

    def to_weight(self) -> Int4Weight:
        """The canonical form, bit by bit as it was packed."""
        codes, scales, offsets = torch.ops.torch_int4.unpack(
            self.packed,
            self.scales,
            self.offsets,
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.group_size,
            weight_type=self.weight_type,
        )
        kind, multipliers = self.offset_kind, None
        if records_of(self.scales) is not None:
            multipliers = torch.ops.torch_int4.unpack_multipliers(
                self.scales, out_features=self.out_features, in_features=self.in_features
            )
        return Int4Weight(
            codes=codes,
            scales=scales,
            zeros=offsets if kind == "integer" else None,
            offsets=offsets if kind == "float" else None,
            multipliers=multipliers,
            perm=self.perm,
            group_size=self.group_size,
            bits=self.type.bits,
            codebook=self.type.codebook,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as a dense `[N, K]` tensor, columns in the order of the input."""
        if dtype is torch.float64:  # which operators do not write
            return self.dequantize().double()
        return torch.ops.torch_int4.dequantize(
            self.packed,
            self.scales,
            self.offsets,
            self.perm,
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.group_size,
            weight_type=self.weight_type,
            dtype=dtype,
        )

    def shares_input_with(self, other: PackedWeight) -> bool:
        """Whether both take the same input, its features in the same order."""
        return self.in_features == other.in_features and _same(self.perm, other.perm)

    def replaceable_by(self, weight: Int4Weight) -> bool:
        """Whether a canonical weight has the shape, groups, type and permutation of this one."""
        own = (self.out_features, self.in_features, self.group_size, self.weight_type)
        return own == (*weight.codes.shape, weight.group_size, weight.type.name) and _same(self.perm, weight.perm)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
