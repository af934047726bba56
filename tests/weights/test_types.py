"""The table of weight types, read from the kernels; codes of 4 bits in bytes; packed weights that are none."""

import dataclasses

import pytest
import torch
from oracle import random_weight

from torch_int4 import Int4Error, Int4Linear, Int4Weight
from torch_int4.weights import nibbles, types
from torch_int4.weights.packed import PackedWeight

OPS = torch.ops.torch_int4


def weight_of(kind: types.WeightType, rows: int = 18) -> Int4Weight:
    if kind.bits == 6:  # which kernels have with scales of two levels alone
        return random_weight(rows, 256, 16, "scales", bits=6)
    return random_weight(rows, 70, 32, bits=kind.bits, codebook=kind.codebook)


def test_files_refer_to_the_order_of_the_code_books() -> None:
    assert types.CODEBOOKS[:4] == ("nf4", "fp4", "bnb_fp4", "iq4_nl")
    assert (types.INT4.zero, types.INT4.largest, types.INT8.zero, types.INT8.largest) == (8, 15, 128, 255)
    assert types.BITS == (4, 5, 6, 8)


@pytest.mark.parametrize("kind", types.TYPES.values(), ids=types.TYPES)
def test_every_row_is_what_the_operators_do(kind: types.WeightType) -> None:
    weight = weight_of(kind)
    assert weight.type is kind
    held = PackedWeight.pack(weight)
    assert held.weight_type == kind.name
    assert held.packed.shape == (2, -(-weight.in_features // 32) * kind.bits, 64)
    back = held.to_weight()
    assert torch.equal(back.codes, weight.codes)
    assert (back.bits, back.codebook) == (kind.bits, kind.codebook)
    if kind.book is None:
        zero = dataclasses.replace(weight, codes=torch.full_like(weight.codes, kind.zero))
        assert not PackedWeight.pack(zero).dequantize().any()
    else:
        assert OPS.codebook(kind.name).tolist() == list(kind.book)
        assert len(kind.book) == kind.levels
    if kind.largest < 255:
        wrong = dataclasses.replace(weight, codes=weight.codes | (kind.largest + 1))
        with pytest.raises(RuntimeError, match=f"from 0 to {kind.largest}"):
            PackedWeight.pack(wrong)
        with pytest.raises(Int4Error, match=rf"codes must be 0\.\.{kind.largest}"):
            wrong.validate()


def test_a_type_that_is_none_is_named_with_those_that_are() -> None:
    names = ", ".join(types.TYPES)
    with pytest.raises(Int4Error, match=f"one of {names}; not 'int3'"):
        types.named("int3")
    weight = weight_of(types.INT4)
    with pytest.raises(RuntimeError, match=f"one of {names}; not 'int3'"):
        OPS.pack(weight.codes, weight.scales, group_size=32, weight_type="int3")
    with pytest.raises(RuntimeError, match="no code book 'int4'"):
        OPS.codebook("int4")
    assert types.find(8, "nf4") is None


@pytest.mark.parametrize("columns", [1, 6, 7])
def test_nibbles_come_back(columns: int) -> None:
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    pairs = nibbles.join(codes)
    assert pairs.shape == (5, -(-columns // 2))
    assert pairs[0, 0] == codes[0, 0] + (16 * codes[0, 1] if columns > 1 else 0)
    assert torch.equal(nibbles.split(pairs)[:, :columns], codes)
    assert torch.equal(nibbles.pair(*nibbles.low_high(pairs)), pairs)
    for bits in types.BITS:
        assert torch.equal(nibbles.restored(nibbles.stored(codes, bits), bits, columns), codes)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("packed", lambda t: t[:, :-1]),
        ("packed", lambda t: t.float()),
        ("scales", lambda t: t.double()),
        ("scales", lambda t: t[:1]),
        ("offsets", lambda t: t.long()),
        ("perm", lambda t: t[:-1]),
        ("perm", lambda t: t.int()),
    ],
)
def test_tensors_that_are_no_packed_weight_are_refused(field: str, change) -> None:
    weight = random_weight(18, 70, 32, "integer")
    weight.perm = torch.randperm(70)
    held = PackedWeight.pack(weight)
    assert Int4Linear(held).packed is held.packed
    wrong = dataclasses.replace(held, **{field: change(getattr(held, field))})
    name = field if field in ("packed", "perm") else f"packed_{field}"
    with pytest.raises(Int4Error, match=f"^{name} must be "):
        Int4Linear(wrong)
    if field in ("packed", "scales"):
        with pytest.raises(Int4Error, match="got nothing"):
            dataclasses.replace(held, **{field: None}).check()


def test_one_constructor_takes_both_forms() -> None:
    weight, bias = random_weight(18, 70, 32, "float"), torch.randn(18).bfloat16()
    one, other = Int4Linear(weight, bias), Int4Linear(PackedWeight.pack(weight), bias, dtype=torch.float16)
    x = torch.randn(3, 70)
    assert torch.equal(one(x), other(x))
    assert (one.compute_dtype, other.compute_dtype) == (torch.bfloat16, torch.float16)
    assert one.nbytes == one.packed_weight.nbytes == other.nbytes
    assert torch.equal(one.dequantize(), weight.dequantize())
    with pytest.raises(Int4Error, match="compute must be one of"):
        Int4Linear(weight, compute="int7")
