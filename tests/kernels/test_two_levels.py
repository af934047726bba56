"""Scales and offsets of two levels, as GGUF's Q4_K has them, against the same numbers with one level in fp32."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

from torch_int4 import Int4Error, Int4Linear, Int4Weight, ops
from torch_int4.weights.arena import Arena, Size
from torch_int4.weights.packed import PackedWeight

COMPUTE = ("int8", "int8x2", "bf16", "fp32")
HALF = torch.finfo(torch.float16)


def random_weight(rows: int, inputs: int, bits: int = 4, seed: int = 0) -> Int4Weight:
    return oracle.random_weight(rows, inputs, 32, "records", bits=bits, seed=seed)


def one_level(weight: Int4Weight) -> Int4Weight:
    """The same weight with fp32 scales and offsets for each group."""
    offsets = weight.group_offsets()
    return Int4Weight(
        weight.codes, weight.group_scales(), offsets=offsets, perm=weight.perm, bits=weight.bits
    ).validate()


def run(x: Tensor, weight: Int4Weight, compute: str) -> Tensor:
    return Int4Linear.from_weight(weight, compute=compute)(x)


def extremes() -> dict[str, Int4Weight]:
    """Weights at the ends of what a record holds."""
    made = {}
    for name, scale, offset, multiplier in (
        ("largest", HALF.max, -HALF.max, 255),
        ("subnormal", 2.0**-24, -(2.0**-24), 63),
        ("negative", -1.0, 1.0, 1),
        ("no multiple", 1.0, 1.0, 0),
        ("no scale", 0.0, -0.0, 63),
    ):
        weight = random_weight(17, 512)
        weight.scales.fill_(scale)
        assert weight.offsets is not None
        assert weight.multipliers is not None
        weight.offsets.fill_(offset)
        weight.multipliers.fill_(multiplier)
        made[name] = weight.validate()
    mixed = random_weight(33, 768, seed=9)
    assert mixed.multipliers is not None
    mixed.multipliers[::2, :, 0] = 0  # scales of some rows, offsets of the others
    mixed.multipliers[1::2, :, 1] = 0
    mixed.scales[:, 1] = 0
    made["mixed"] = mixed.validate()
    return made


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_bits_of_one_level_in_fp32(isa: str, bits: int, compute: str) -> None:
    for rows, outputs, inputs in ((1, 33, 512), (2, 16, 256), (5, 50, 1280), (9, 1, 256), (19, 17, 768), (67, 40, 512)):
        if isa == "reference" and rows > 9:
            continue
        weight = random_weight(outputs, inputs, bits, seed=rows)
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
        assert torch.equal(run(x, weight, compute), run(x, one_level(weight), compute)), (rows, outputs, inputs)


@pytest.mark.parametrize("compute", COMPUTE)
def test_every_kernel_set_gives_the_bits_of_the_reference(compute: str) -> None:
    for name, weight in extremes().items():
        for rows in (1, 3, 21):
            x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(rows))
            ops.set_isa("reference")
            expected = run(x, weight, compute)
            assert expected.isfinite().all()
            for isa in ops.isas():
                ops.set_isa(isa)
                assert ops.isa() == isa
                y = run(x, weight, compute)
                if compute == "bf16":  # sums of tiles run in another order
                    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
                else:
                    assert torch.equal(y, expected), (name, isa, rows)
    ops.set_isa("")


def test_products_are_those_of_the_dense_weight(isa: str) -> None:
    weight = random_weight(40, 512)
    x = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ weight.dequantize().double().T
    assert (run(x, weight, "fp32") - exact).norm() < 1e-6 * exact.norm()
    assert (run(x, weight, "int8") - exact).norm() < 2e-2 * exact.norm()


def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(isa: str) -> None:
    weight = random_weight(50, 512)
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(0))
    y = run(x, weight, "int8")
    for row in (0, 1, 39):
        assert torch.equal(run(x[row : row + 1], weight, "int8"), y[row : row + 1])


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_every_bit_and_four_and_five_eighths(bits: int) -> None:
    weight = random_weight(35, 1024, bits)
    weight.codes &= 31  # as in Q5_K: their products with scales are exact, and the weight in float is rounded once
    weight.perm = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    memory = Arena([Size.of(weight)])
    for packed in (PackedWeight.pack(weight), PackedWeight.pack(weight, memory.take)):
        assert packed.check().offset_kind == "float"
        again = packed.to_weight().validate()
        for field in ("codes", "scales", "offsets", "multipliers", "perm"):
            assert torch.equal(getattr(again, field), getattr(weight, field)), field
        assert again.zeros is None
        assert torch.equal(packed.dequantize(), weight.dequantize())
        assert packed.nbytes - 1024 * 8 == Size.of(weight).nbytes
    weight.perm = None
    whole = random_weight(32, 1024, bits)
    assert PackedWeight.pack(whole).nbytes * 8 == (bits + 0.625) * 32 * 1024
    assert whole.bits_per_weight == bits + 0.625


def test_weights_of_one_and_two_levels_share_a_call(isa: str) -> None:
    weights = [random_weight(20, 256), one_level(random_weight(33, 256, seed=1)), random_weight(16, 256, seed=2)]
    linears = [Int4Linear.from_weight(weight) for weight in weights]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    together = torch.ops.torch_int4.int4_linears(
        x,
        [one.packed for one in linears],
        [one.packed_scales for one in linears],
        [one.packed_offsets for one in linears],
        [None] * 3,
        out_features=[20, 33, 16],
        group_size=32,
    )
    assert all(torch.equal(y, one(x)) for y, one in zip(together, linears, strict=True))


def test_a_state_dict_holds_what_was_packed_and_takes_one_level_too() -> None:
    weight, other = random_weight(20, 512), random_weight(20, 512, seed=1)
    linear = Int4Linear.from_weight(weight, compute="fp32")
    state = linear.state_dict()
    assert sum(t.nbytes for t in state.values()) * 8 == 4.625 * 20 * 512
    again = Int4Linear.from_weight(other)
    again.load_state_dict(state)
    assert torch.equal(again.packed_scales, linear.packed_scales)
    again.load_state_dict(Int4Linear.from_weight(one_level(weight)).state_dict())  # of models saved before
    assert torch.equal(again.dequantize(), linear.dequantize())
    state["multipliers"] = state["multipliers"][:, :-1]
    with pytest.raises(RuntimeError, match="multipliers must have shape"):
        again.load_state_dict(state)


def test_operators_name_what_is_wrong() -> None:
    held = PackedWeight.pack(random_weight(20, 512))
    call, x = torch.ops.torch_int4.int4_linear, torch.zeros(1, 512)
    with pytest.raises(RuntimeError, match="such records need groups of 32"):
        call(x, held.packed, held.scales, out_features=20, group_size=64)
    with pytest.raises(RuntimeError, match="hold the offsets"):
        call(x, held.packed, held.scales, torch.zeros(2, 16, 16, dtype=torch.uint8), out_features=20, group_size=32)
    with pytest.raises(RuntimeError, match="scales has shape"):
        call(x, held.packed, held.scales[:, :1].contiguous(), out_features=20, group_size=32)
    with pytest.raises(RuntimeError, match="multiple of 256"):
        torch.ops.torch_int4.unpack_multipliers(held.scales, out_features=20, in_features=500)
    with pytest.raises(Int4Error, match="packed_scales must be"):
        PackedWeight(held.packed, held.scales[:1], None, None, 20, 512, 32, "int4").check()
    weight = random_weight(20, 512)
    weight.scales = weight.scales.float()
    with pytest.raises(RuntimeError, match="scales must be float16 where there are multipliers"):
        PackedWeight.pack(weight)


def test_opcheck() -> None:
    weight = random_weight(20, 512)
    options = {"group_size": 32, "multipliers": weight.multipliers}
    torch.library.opcheck(
        torch.ops.torch_int4.pack.default, (weight.codes, weight.scales, None, weight.offsets), options
    )
    packed = PackedWeight.pack(weight)
    sizes = {"out_features": 20, "in_features": 512}
    torch.library.opcheck(
        torch.ops.torch_int4.unpack.default, (packed.packed, packed.scales, None), {**sizes, "group_size": 32}
    )
    torch.library.opcheck(torch.ops.torch_int4.unpack_multipliers.default, (packed.scales,), sizes)
