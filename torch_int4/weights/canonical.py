"""`Int4Weight`: the canonical form of a quantized weight, which no ISA and no file format shows through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_int4 import _C
from torch_int4.errors import Int4Error
from torch_int4.weights import types

TENSORS = ("codes", "scales", "zeros", "offsets", "multipliers", "perm")  # of an `Int4Weight`
RECORD_INPUTS = _C.RECORD_INPUTS  # that share a scale and an offset where there are multipliers
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def group_spans(inputs: int, group_size: int) -> Iterator[tuple[slice, slice, int]]:
    """The columns of a row as (columns, groups, inputs per group): all full groups first, then a shorter
    last one.

    Each span can be viewed as `[N, groups, inputs per group]` without padding.
    """
    size = inputs if group_size == -1 else min(group_size, inputs)
    full = inputs // size
    yield slice(0, full * size), slice(0, full), size
    if inputs % size:
        yield slice(full * size, inputs), slice(full, full + 1), inputs % size


class Records(NamedTuple):
    """A kind of scales of two levels, as they are packed: a record for 256 inputs of 16 rows (csrc/kernels/kernel.h).

    Attributes:
        nbytes: of a record.
        group_size: inputs of a group.
        has_offsets: whether a record holds offsets, too.
    """

    nbytes: int
    group_size: int
    has_offsets: bool


RECORDS = tuple(Records(*kind) for kind in _C.record_kinds())


@dataclass
class Int4Weight:
    """Codes with scales and offsets per group of inputs; N outputs, K inputs, G = ceil(K / group_size)
    groups.

    w[n, k] = scales * (codes - zero), or scales * codes + offsets, with the scale and offset of k's group.
    Products and sums are single fp32 operations, so that a float weight that lies on such a grid comes back
    bit by bit.

    Scales, and offsets, may have two levels, as those of GGUF's Q4_K and Q6_K: `scales` and `offsets` are then shared
    by 256 inputs, and `multipliers` say how many times the one and the other each group takes; these products are
    exact.

    Attributes:
        codes: uint8 `[N, K]`, 0..2^bits - 1.
        scales: fp32, fp16 or bf16 `[N, G]`; a scale may be negative or zero. Or uint8: 2^(scale - 127), the shared
            exponents (E8M0) of MXFP4, which is the code book "fp4" with such scales and groups of 32.
            With multipliers: fp16 `[N, K / 256]`.
        zeros: uint8 `[N, G]` integer zero points, or None.
        offsets: shaped and typed as the scales, the weight of code 0, or None.
            With neither, the weight is symmetric: the zero point is 2^(bits - 1).
        multipliers: uint8 `[N, G, 2]`, of the scale and of the offset of each group, where there are offsets;
            int8 `[N, G]`, of the scale, where there are none; or None. K must be a multiple of 256, and groups have 32
            inputs, or 16 (without offsets).
        perm: int64 `[K]` or None. Column k of the codes belongs to column `perm[k]` of the input.
        group_size: inputs per group along the columns of the codes, or -1 for one group per row.
        bits: 4, 5, 6 (with multipliers and groups of 16) or 8.
        codebook: None, or the name of 16 values that 4-bit codes point to: "nf4" (QLoRA, arXiv 2305.14314), "fp4"
            (E2M1 of the OCP Microscaling formats), "bnb_fp4" (what bitsandbytes calls FP4) or "iq4_nl" (the integers
            of GGUF's IQ4_NL and IQ4_XS).
            Then w = scales * value[codes], without zeros or offsets.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    perm: Tensor | None = None
    group_size: int = 32
    bits: int = 4
    codebook: str | None = None
    multipliers: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Outputs, N."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs, K."""
        return self.codes.shape[1]

    @property
    def type(self) -> types.WeightType:
        """The row of the table of types. Raises `Int4Error` where there is none for these bits and this code book."""
        self._check_type("weight")
        found = types.find(self.bits, self.codebook)
        assert found is not None
        return found

    @property
    def groups(self) -> int:
        """Groups of a row, G."""
        return 1 if self.group_size == -1 else -(-self.in_features // self.group_size)

    @property
    def records(self) -> Records | None:
        """The kind of records that scales of two levels become when they are packed; None of others."""
        if self.multipliers is None:
            return None
        wanted = (self.group_size, self.offsets is not None)
        return next((kind for kind in RECORDS if kind[1:] == wanted), None)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight with scales, offsets and permutation, before any padding."""
        extra = [t for t in (getattr(self, name) for name in TENSORS[1:]) if t is not None]
        return self.bits + sum(8 * t.numel() * t.element_size() for t in extra) / self.codes.numel()

    def validate(self, name: str = "weight") -> Int4Weight:
        """Check everything that kernels rely on, and return self.

        Raises:
            Int4Error: naming `name`, the tensor and the reason.
        """
        self._check_type(name)
        self._check_codes(name)
        self._check_multipliers(name)
        self._check_scales(name)
        self._check_offsets(name)
        self._check_perm(name)
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight `[N, K]`, columns in the order of the input (the permutation undone)."""
        out = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        every_scale, every_offset = self.group_scales(), self.group_offsets()
        for columns, groups, size in group_spans(self.in_features, self.group_size):
            codes = self.codes[:, columns].unflatten(1, (-1, size))
            scales = every_scale[:, groups, None]
            if self.codebook is not None:
                values = torch.ops.torch_int4.codebook(self.codebook)[codes.long()].mul_(scales)
            elif every_offset is not None:
                values = (scales * codes).add_(every_offset[:, groups, None])
            else:
                zeros = self.type.zero if self.zeros is None else self.zeros[:, groups, None].float()
                values = (codes.float() - zeros).mul_(scales)
            out[:, columns] = values.flatten(1)
        if self.perm is None:
            return out
        ordered = torch.empty_like(out)
        ordered[:, self.perm] = out
        return ordered

    def group_scales(self) -> Tensor:
        """fp32 `[N, G]`, the scale of each group."""
        if self.multipliers is not None:
            own = self.multipliers if self.offsets is None else self.multipliers[..., 0]
            return _two_levels(self.scales, own)
        if self.scales.dtype != torch.uint8:
            return self.scales.float()
        exponents = self.scales.int()
        return torch.where(exponents == 0, 0x00400000, exponents << 23).view(torch.float32)

    def group_offsets(self) -> Tensor | None:
        """fp32 `[N, G]`, the float offset of each group; None where there are none."""
        if self.offsets is None or self.multipliers is None:
            return None if self.offsets is None else self.offsets.float()
        return _two_levels(self.offsets, self.multipliers[..., 1])

    @property
    def _shared_shape(self) -> tuple[int, int]:
        """The shape of scales and offsets."""
        return self.out_features, self.groups if self.multipliers is None else self.in_features // RECORD_INPUTS

    def _check_type(self, name: str) -> None:
        if self.bits not in types.BITS:
            raise Int4Error(f"{name}: bits must be {' or '.join(map(str, types.BITS))}, got {self.bits!r}")
        if types.find(self.bits, self.codebook) is None:
            known = ", ".join(types.CODEBOOKS)
            bits = " or ".join(str(n) for n in types.BITS if any(types.find(n, book) for book in types.CODEBOOKS))
            raise Int4Error(f"{name}: codebook must be one of {known}, with {bits} bits; got {self.codebook!r}")

    def _check_codes(self, name: str) -> None:
        _check(name, "codes", self.codes, (torch.uint8,), None)
        if self.codes.dim() != 2 or self.codes.numel() == 0:
            raise Int4Error(f"{name}: codes must be [N, K] with N, K > 0, got shape {list(self.codes.shape)}")
        self._check_range(name, "codes", self.codes)
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise Int4Error(f"{name}: group_size must be positive, or -1 for one group per row; got {size!r}")

    def _check_scales(self, name: str) -> None:
        dtypes = SCALE_DTYPES if self.multipliers is None else (torch.float16,)
        _check(name, "scales", self.scales, dtypes, self._shared_shape, self.codes.device)
        finite = (self.scales != 255) if self.scales.dtype == torch.uint8 else torch.isfinite(self.scales)
        if not bool(finite.all()):
            raise Int4Error(f"{name}: scales hold NaN or infinity")

    def _check_multipliers(self, name: str) -> None:
        if self.multipliers is None:
            return
        if self.records is None or self.in_features % RECORD_INPUTS:
            raise Int4Error(
                f"{name}: multipliers need groups of 32 inputs, or of 16 without offsets, and a multiple of "
                f"{RECORD_INPUTS} inputs, and these are {self.in_features} in groups of {self.group_size}"
            )
        pairs = self.records.has_offsets
        shape = (self.out_features, self.groups, 2) if pairs else (self.out_features, self.groups)
        dtype = torch.uint8 if pairs else torch.int8
        _check(name, "multipliers", self.multipliers, (dtype,), shape, self.codes.device)

    def _check_offsets(self, name: str) -> None:
        if self.zeros is not None and self.offsets is not None:
            raise Int4Error(f"{name}: has both zeros and offsets; give one of them, or neither when symmetric")
        if self.codebook is not None and (self.zeros is not None or self.offsets is not None):
            raise Int4Error(f"{name}: a weight with a codebook has neither zeros nor offsets")
        if self.offsets is not None and self.scales.dtype == torch.uint8:
            raise Int4Error(f"{name}: offsets need scales that are floats, and these are exponents (uint8)")
        if self.zeros is not None:
            _check(name, "zeros", self.zeros, (torch.uint8,), self._shared_shape, self.codes.device)
            self._check_range(name, "zeros", self.zeros)
        if self.offsets is not None:
            _check(name, "offsets", self.offsets, (self.scales.dtype,), self._shared_shape, self.codes.device)
            if not bool(torch.isfinite(self.offsets).all()):
                raise Int4Error(f"{name}: offsets hold NaN or infinity")

    def _check_range(self, name: str, field: str, values: Tensor) -> None:
        largest = self.type.largest
        if largest < 255 and int(values.max()) > largest:
            raise Int4Error(f"{name}: {field} must be 0..{largest}, found {int(values.max())}")

    def _check_perm(self, name: str) -> None:
        if self.perm is None:
            return
        _check(name, "perm", self.perm, (torch.int64,), (self.in_features,), self.codes.device)
        order = torch.arange(self.in_features, device=self.perm.device)
        if not torch.equal(self.perm.sort().values, order):
            raise Int4Error(f"{name}: perm is not a permutation of 0..{self.in_features - 1}")


def _two_levels(shared: Tensor, multipliers: Tensor) -> Tensor:
    return shared.float().repeat_interleave(multipliers.shape[1] // shared.shape[1], 1) * multipliers


def _check(
    name: str,
    field: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None,
    device: torch.device | None = None,
) -> None:
    if not isinstance(tensor, Tensor):
        raise Int4Error(f"{name}: {field} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_meta:
        raise Int4Error(f"{name}: {field} is on the meta device and has no values; load the weights first")
    if device is not None and tensor.device != device:
        raise Int4Error(f"{name}: {field} is on {tensor.device}, codes are on {device}; move them to one device")
    if tensor.dtype not in dtypes:
        raise Int4Error(f"{name}: {field} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise Int4Error(f"{name}: {field} must have shape {list(shape)}, got {list(tensor.shape)}")
