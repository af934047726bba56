"""The layout that GPTQ files and those of AutoRound share.

Per linear of N outputs and K inputs, with B bits and G groups:
    qweight  int32 [K*B/32, N]: word r of a column holds the codes of inputs r*32/B and up, low bits first
    qzeros   int32 [G, N*B/32]: zero points, packed along N in the same way
    scales   float [G, N]
    g_idx    int32 [K], the group of each input; without it inputs are grouped in order
w = scale * (code - zero point). Files of version 1 store each zero point minus one: 1 is subtracted from every field
of the word as a whole, with borrows, and added back in the same way (gptqmodel 7.7, utils/model.py). Where a file says
that it is symmetric, its zero points themselves show the version: optimum 2.3 writes version 1 and calls it gptq_v2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.formats.parts import bits as _bits
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts.format import Settings
from torch_int4.formats.parts.order import from_group_index, to_group_index
from torch_int4.weights.canonical import Int4Weight

ONES = {4: 0x11111111, 8: 0x01010101}
INTEGERS = (torch.int32, torch.int64)


def read(
    tensors: Mapping[str, Tensor], settings: Settings, *, minus_one: bool, shape: tuple[int, int], name: str
) -> Int4Weight:
    """The weight of one linear; `minus_one`: zero points are stored so (version 1), unless symmetric ones tell."""
    rows, inputs = shape
    qweight = _checks.take(tensors, "qweight", name, (torch.int32,))
    bits = _bits_of(qweight, settings, shape, name)
    codes = _bits.trim(_bits.unpack_words(qweight.t(), bits), inputs, name)
    scales = _checks.floats(tensors, "scales", name)
    if scales.dim() != 2 or scales.shape[1] != rows or scales.shape[0] == 0:
        raise Int4Error(f"{name}.scales: must have shape [groups, {rows}], got {list(scales.shape)}")
    groups = scales.shape[0]
    size = _checks.groups_of(groups, inputs, settings.group_size, mixed=settings.mixed, name=f"{name}.scales")
    zeros = _read_zeros(tensors, bits, (groups, rows), settings.symmetric, minus_one, name)
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    offset = None if symmetric else zeros
    weight = Int4Weight(codes, scales.t().contiguous(), zeros=offset, group_size=size, bits=bits)
    if "g_idx" in tensors:
        from_group_index(weight, _checks.take(tensors, "g_idx", name, INTEGERS), f"{name}.g_idx")
    return _checks.serve(weight, name)


def write(weight: Int4Weight, *, minus_one: bool, name: str) -> dict[str, Tensor]:
    """The tensors of one linear, {suffix: tensor}.

    Raises:
        Int4Error: float offsets or a code book, or sizes that leave a word half full.
    """
    weight.validate(name)
    refuse_to_write(weight, name, "GPTQ")
    per_word = 32 // weight.bits
    if weight.in_features % per_word or weight.out_features % per_word:
        sizes = f"{weight.out_features} x {weight.in_features}"
        raise Int4Error(f"{name}: is {sizes}, and GPTQ files hold multiples of {per_word}; leave it in float")
    codes, index = to_group_index(weight)
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full(weight.scales.shape, 1 << (weight.bits - 1), dtype=torch.uint8)
    qzeros = _bits.pack_words(zeros.t(), weight.bits)
    if minus_one:
        qzeros = _wrapping_add(qzeros, -ONES[weight.bits])
    return {
        "qweight": _bits.pack_words(codes, weight.bits).t().contiguous(),
        "qzeros": qzeros,
        "scales": weight.scales.t().contiguous(),
        "g_idx": index,
    }


def refuse_to_write(weight: Int4Weight, name: str, form: str) -> None:
    """Raise for what integer grids cannot express."""
    reason = _checks.no_integer_grid(weight)
    if reason is not None:
        raise Int4Error(
            f"{name}: {reason}, which {form} files cannot express; quantize it with integer or symmetric zero points"
        )


def _bits_of(qweight: Tensor, settings: Settings, shape: tuple[int, int], name: str) -> int:
    rows, inputs = shape
    for bits in (settings.bits, 4, 8) if settings.mixed else (settings.bits,):
        if tuple(qweight.shape) == (_bits.words_for(inputs, bits), rows):
            return bits
    want = [_bits.words_for(inputs, settings.bits), rows]
    raise Int4Error(f"{name}.qweight: must have shape {want}, got {list(qweight.shape)}")


def _read_zeros(
    tensors: Mapping[str, Tensor], bits: int, shape: tuple[int, int], symmetric: bool, minus_one: bool, name: str
) -> Tensor:
    groups, rows = shape
    words = _checks.take(tensors, "qzeros", name, (torch.int32,), (groups, _bits.words_for(rows, bits)))
    stored = _bits.trim(_bits.unpack_words(words, bits), rows, name)
    middle = 1 << (bits - 1)
    if symmetric and any(bool((stored == zero).all()) for zero in (middle, middle - 1)):
        return torch.full(shape, middle, dtype=torch.uint8)
    if minus_one:
        stored = _bits.trim(_bits.unpack_words(_wrapping_add(words, ONES[bits]), bits), rows, name)
    return stored.t().contiguous()


def _wrapping_add(words: Tensor, value: int) -> Tensor:
    """int32 words plus a constant, modulo 2^32."""
    total = words.long() + value
    return ((total + (1 << 31)) % (1 << 32) - (1 << 31)).int()
