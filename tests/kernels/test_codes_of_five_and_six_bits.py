"""Codes whose high bits have lines of their own, and scales of two levels without offsets, as GGUF has both."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from torch_int4 import Int4Error, Int4Linear, Int4Weight, formats, ops
from torch_int4.formats import Settings
from torch_int4.weights import nibbles
from torch_int4.weights.arena import Arena, Size
from torch_int4.weights.packed import PackedWeight

FP32_SUM = 1e-6
# (bits, group size, kind, code book) of weights that no other test of kernels has
KINDS: dict[str, tuple[int, int, str, str | None]] = {
    "Q5_0": (5, 32, "symmetric", None),
    "Q5_1": (5, 32, "float", None),
    "Q5_K": (5, 32, "records", None),
    "Q6_K": (6, 16, "scales", None),
    "Q3_K": (4, 16, "scales", None),
    "IQ4_XS": (4, 32, "scales", "iq4_nl"),
}
LARGE_GROUPS = {"five bits in rows": (5, -1, "symmetric", None), "five bits in 128": (5, 128, "float", None)}
BITS = {"Q5_0": 5.5, "Q5_1": 6.0, "Q5_K": 5.625, "Q6_K": 6.5625, "Q3_K": 4.5625, "IQ4_XS": 4.3125}


def random_weight(kind: str, rows: int, inputs: int, seed: int = 0) -> Int4Weight:
    bits, size, offsets, book = {**KINDS, **LARGE_GROUPS}[kind]
    return oracle.random_weight(rows, inputs, size, offsets, bits=bits, codebook=book, seed=seed)


def run(x: Tensor, weight: Int4Weight, compute: str = "int8") -> Tensor:
    return Int4Linear.from_weight(weight, compute=compute)(x)


def random(rows: int, inputs: int) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "Q6_K", "Q3_K", "IQ4_XS", *LARGE_GROUPS])
def test_every_row_count(isa: str, kind: str) -> None:
    weight = random_weight(kind, 33, 512)
    for rows in range(1, 40, 9 if isa == "reference" else 1):
        x = random(rows, 512)
        assert oracle.sum_error(run(x, weight), x, weight) < FP32_SUM, rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compute", ["int8", "int8x2", "bf16", "fp32"])
def test_every_kernel_set_gives_the_bits_of_the_reference(kind: str, compute: str) -> None:
    for rows, outputs, inputs in ((1, 33, 768), (1, 130, 256), (3, 17, 512), (7, 16, 256), (21, 70, 1280)):
        weight, x = random_weight(kind, outputs, inputs, seed=rows), random(rows, inputs)
        ops.set_isa("reference")
        expected = run(x, weight, compute)
        for isa in ops.isas():
            ops.set_isa(isa)
            assert ops.isa() == isa
            y = run(x, weight, compute)
            if compute == "bf16":  # sums of tiles run in another order
                torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
            else:
                assert torch.equal(y, expected), (isa, rows)
    ops.set_isa("")


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_weight(isa: str, kind: str) -> None:
    weight, x = random_weight(kind, 40, 512), random(6, 512)
    exact = x.double() @ weight.dequantize().double().T
    for compute, bound in (("fp32", 2e-6), ("bf16", 1e-2), ("int8x2", 2e-3), ("int8", 8e-2)):
        assert (run(x, weight, compute) - exact).norm() < bound * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_operands_at_their_extremes_do_not_saturate(isa: str, kind: str, rows: int) -> None:
    bits, _, offsets, book = KINDS[kind]
    for code in (0, (1 << bits) - 1):
        for sign in (1.0, -1.0):
            weight = random_weight(kind, 16, 512)
            weight.codes.fill_(code)
            weight.codes[::2] = (1 << bits) - 1 - code
            weight.scales.fill_(1.0)
            if weight.offsets is not None:
                weight.offsets.fill_(0.0)
            if weight.multipliers is not None:
                weight.multipliers.fill_(63 if offsets == "records" else -128)
            x = torch.full((rows, 512), 127.0 * sign)
            assert torch.equal(run(x, weight.validate()).double(), x.double() @ weight.dequantize().double().T), book


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch_and_nan_stays_in_its_row(isa: str, kind: str) -> None:
    weight, x = random_weight(kind, 50, 512), random(40, 512)
    x[3, 500], x[4, 17] = float("nan"), float("inf")
    y = run(x, weight)
    for row in (0, 1, 39):
        assert torch.equal(run(x[row : row + 1], weight), y[row : row + 1])
    assert y[3].isnan().all()
    assert not y[4].isfinite().any()
    assert y[[0, 1, 2, 5]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_packing_keeps_every_bit(kind: str) -> None:
    weight = random_weight(kind, 35, 1024)
    weight.perm = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    memory = Arena([Size.of(weight)])
    for packed in (PackedWeight.pack(weight), PackedWeight.pack(weight, memory.take)):
        again = packed.check().to_weight().validate()
        for field in ("codes", "scales", "offsets", "multipliers", "perm"):
            want, got = getattr(weight, field), getattr(again, field)
            assert (got is None) == (want is None), field
            assert got is None or torch.equal(got, want), field
        assert (again.bits, again.group_size, again.codebook) == (weight.bits, weight.group_size, weight.codebook)
        if kind not in ("Q5_1", "Q5_K"):  # whose products round once in kernels, and twice in torch
            assert torch.equal(packed.dequantize(), weight.dequantize())
        assert packed.nbytes - 1024 * 8 == Size.of(weight).nbytes
    whole = random_weight(kind, 32, 1024)
    assert PackedWeight.pack(whole).nbytes * 8 / (32 * 1024) == BITS[kind] == whole.bits_per_weight


@pytest.mark.parametrize("kind", KINDS)
def test_files_keep_every_bit_in_as_many(kind: str) -> None:
    weight = random_weight(kind, 20, 768)
    form = formats.get("native")
    tensors = form.write(weight, Settings(), name="m")
    assert tensors["int4_codes"].numel() * 8 == weight.bits * 20 * 768
    again = form.read(tensors, Settings(), shape=(20, 768), name="m")
    linear, other = Int4Linear.from_weight(weight), Int4Linear.from_weight(random_weight(kind, 20, 768, seed=1))
    other.load_state_dict(linear.state_dict())
    for found in (again, other.packed_weight.to_weight()):
        assert torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 33])
def test_stored_codes_come_back(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    stored = nibbles.stored(codes, bits)
    assert stored.shape == (3, nibbles.stored_columns(bits, columns))
    assert torch.equal(nibbles.restored(stored, bits, columns), codes)


def test_what_no_kernel_has_is_refused() -> None:
    six = random_weight("Q6_K", 20, 512)
    for changed, reason in (
        ({"multipliers": None, "scales": torch.ones(20, 32)}, "groups of 16 inputs need scales of two levels"),
        ({"group_size": 32, "multipliers": None, "scales": torch.ones(20, 16)}, "no kernel has this kind of offsets"),
    ):
        weight = Int4Weight(**{**vars(six), **changed})
        with pytest.raises(RuntimeError, match=reason):
            PackedWeight.pack(weight)
    zeros = torch.zeros(20, 16, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="no kernel has this kind of offsets for this weight_type"):
        PackedWeight.pack(Int4Weight(six.codes >> 1, torch.ones(20, 16), zeros, bits=5))
    with pytest.raises(Int4Error, match=r"multipliers must be torch\.int8"):
        Int4Weight(**{**vars(six), "multipliers": six.multipliers.to(torch.uint8)}).validate()
    with pytest.raises(Int4Error, match="multiple of 256 inputs, and these are 512 in groups of 64"):
        Int4Weight(**{**vars(six), "group_size": 64}).validate()
    with pytest.raises(Int4Error, match=r"codes must be 0\.\.63"):
        Int4Weight(**{**vars(six), "codes": six.codes + 64}).validate()
    packed = PackedWeight.pack(six)
    with pytest.raises(RuntimeError, match="such records need groups of 16"):
        torch.ops.torch_int4.int4_linear(
            torch.zeros(1, 512), packed.packed, packed.scales, out_features=20, group_size=32, weight_type="int6"
        )


@pytest.mark.parametrize("kind", ["Q6_K", "IQ4_XS"])
def test_opcheck(kind: str) -> None:
    weight = random_weight(kind, 20, 512)
    options: dict[str, Any] = {"group_size": weight.group_size, "weight_type": weight.type.name}
    given = (weight.codes, weight.scales, None, None)
    torch.library.opcheck(torch.ops.torch_int4.pack.default, given, {**options, "multipliers": weight.multipliers})
    packed, sizes = PackedWeight.pack(weight), {"out_features": 20, "in_features": 512}
    torch.library.opcheck(torch.ops.torch_int4.unpack.default, (packed.packed, packed.scales, None), sizes | options)
    torch.library.opcheck(torch.ops.torch_int4.unpack_multipliers.default, (packed.scales,), sizes)
