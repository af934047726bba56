"""`int4_linear` of every kernel set against float64, on shapes and operands chosen to break it."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from torch import Tensor

from torch_int4 import Int4Linear, Int4Weight, ops

KINDS = ("symmetric", "integer", "float")
GROUPS = (32, 64, 96, 128, 256, 512, 1024, -1)
SIZES = sorted({*range(1, 16), *(2**n + d for n in range(4, 9) for d in (-1, 0, 1))})
# Sums are fp32, one fused multiply-add per block.
FP32_SUM = 1e-6


def run(x: Tensor, weight: Int4Weight, compute: str = "int8", bias: Tensor | None = None) -> Tensor:
    return Int4Linear.from_weight(weight, bias, compute=compute)(x)


def sizes_for(isa: str) -> list[int]:
    return SIZES if isa != "reference" else [1, 2, 7, 16, 17, 33, 65]  # a scalar loop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_row_count(isa: str, kind: str, bits: int) -> None:
    weight = oracle.random_weight(33, 100, 32, kind, bits=bits)
    for rows in range(1, 65, 9 if isa == "reference" else 1):
        x = torch.randn(rows, 100, generator=torch.Generator().manual_seed(rows))
        assert oracle.scaled_error(run(x, weight), oracle.linear_int8(x, weight)) < FP32_SUM, rows


@pytest.mark.parametrize("group_size", GROUPS)
def test_odd_shapes_and_every_group(isa: str, group_size: int) -> None:
    sizes = sizes_for(isa)
    for turn, (n, k) in enumerate(itertools.product(sizes[::3], sizes[::2])):
        weight = oracle.random_weight(n, k, group_size, KINDS[turn % 3], bits=4 + turn % 2 * 4, seed=turn)
        x = torch.randn(1 + turn % 7, k, generator=torch.Generator().manual_seed(turn))
        assert oracle.sum_error(run(x, weight), x, weight) < FP32_SUM, (n, k, KINDS[turn % 3])


@pytest.mark.parametrize("group_size", [128, 256, 1024, -1])
def test_long_rows(isa: str, group_size: int) -> None:
    weight = oracle.random_weight(20, 2500, group_size, "integer")
    x = torch.randn(5, 2500, generator=torch.Generator().manual_seed(1))
    assert oracle.scaled_error(run(x, weight), oracle.linear_int8(x, weight)) < FP32_SUM


@pytest.mark.parametrize("zero", [0, 1, 7, 8, 15])
def test_zero_points(isa: str, zero: int) -> None:
    weight = oracle.random_weight(17, 96, 32, "integer", zero=zero)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(zero))
    y = run(x, weight)
    assert oracle.scaled_error(y, oracle.linear_int8(x, weight)) < FP32_SUM
    if zero == 8:
        symmetric = Int4Weight(weight.codes, weight.scales, None, None, None, 32)
        assert torch.equal(y, run(x, symmetric))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_operands_at_their_extremes_do_not_saturate(isa: str, bits: int, rows: int) -> None:
    """All codes at their maximum times all activations at ±127: int16 sums reach 30480 of 32767."""
    top = 2**bits - 1
    for group_size, sign in itertools.product((32, 128, -1), (1.0, -1.0)):
        for low in (0, top):
            codes = torch.full((16, 512), low, dtype=torch.uint8)
            codes[::2] = top
            groups = 1 if group_size == -1 else 512 // group_size
            zeros = torch.full((16, groups), top - low, dtype=torch.uint8)
            weight = Int4Weight(codes, torch.ones(16, groups), zeros, None, None, group_size, bits).validate()
            x = torch.full((rows, 512), 127.0 * sign)
            assert torch.equal(run(x, weight).double(), x.double() @ oracle.dense(weight).T)


@pytest.mark.parametrize("compute", ["int8", "int8x2", "bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_not_finite_rows_stay_in_their_row(isa: str, compute: str, kind: str) -> None:
    weight = oracle.random_weight(40, 200, 64, kind)
    x = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    clean = run(x, weight, compute)
    x[1, 199], x[3, 0], x[4, 7] = float("nan"), float("inf"), float("-inf")
    y = run(x, weight, compute)
    assert torch.equal(y[[0, 2, 5]], clean[[0, 2, 5]])
    assert y[1].isnan().all()
    assert not y[[3, 4]].isfinite().any()


def test_tiny_zero_and_huge_rows(isa: str) -> None:
    weight = oracle.random_weight(16, 64, 32)
    x = torch.ones(4, 64)
    x[0], x[1], x[2] = 0.0, 1e-40, 1e30
    y = run(x, weight)
    assert torch.equal(y[0], torch.zeros(16))
    assert y[1].abs().max() < 1e-35
    assert oracle.scaled_error(y[2], oracle.linear_int8(x[2:3], weight)[0]) < FP32_SUM


@pytest.mark.parametrize(("compute", "bound"), [("int8x2", 2e-4), ("bf16", 6e-3), ("fp32", 1e-6)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_other_ways_to_compute(isa: str, compute: str, bound: float, kind: str, bits: int) -> None:
    for rows, n, k, group_size in ((1, 65, 300, 32), (2, 40, 129, 128), (7, 16, 32, 32), (40, 50, 700, -1)):
        weight = oracle.random_weight(n, k, group_size, kind, bits=bits)
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
        y = run(x, weight, compute)
        assert oracle.scaled_error(y, x.double() @ oracle.dense(weight).T) < bound, (rows, n, k)


def test_int8x2_carries_an_outlier(isa: str) -> None:
    """One activation 1000 times larger than the rest ruins int8, and not int8x2."""
    weight = oracle.random_weight(32, 128, 128)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 1000.0
    exact = x.double() @ oracle.dense(weight).T
    small = exact - x[:, 5:6].double() * oracle.dense(weight)[:, 5]
    error = [float((run(x, weight, c).double() - exact).norm() / small.norm()) for c in ("int8", "int8x2")]
    assert error[0] > 0.1
    assert error[1] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_dtypes_bias_and_leading_dimensions(isa: str, dtype: torch.dtype, compute: str) -> None:
    weight = oracle.random_weight(37, 96, 32)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(37, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = run(x, weight, compute, bias)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 37)
    rows = x.float().reshape(6, 96)
    expected = run(rows, weight, compute, bias.float()).to(dtype).reshape(2, 3, 37)
    assert torch.equal(y, expected)
    assert run(x[0, 0], weight, compute, bias).shape == (37,)
    assert run(x[:0], weight, compute, bias).shape == (0, 3, 37)
    assert torch.equal(run(x.transpose(0, 1), weight, compute, bias), y.transpose(0, 1))


@pytest.mark.parametrize("compute", ["int8", "int8x2", "bf16", "fp32"])
def test_permuted_inputs(isa: str, compute: str) -> None:
    weight = oracle.random_weight(20, 100, 32, "integer")
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    perm = torch.randperm(100, generator=torch.Generator().manual_seed(2))
    permuted = Int4Weight(weight.codes, weight.scales, weight.zeros, None, perm, 32).validate()
    scattered = torch.empty_like(x)
    scattered[:, perm] = x
    assert torch.equal(run(scattered, permuted, compute), run(x, weight, compute))


@pytest.mark.parametrize("compute", ["int8", "int8x2", "bf16", "fp32"])
def test_the_same_bits_on_every_thread_count(isa: str, compute: str) -> None:
    rows = 3 if isa == "reference" else 200
    weight = oracle.random_weight(170, 500, 64, "float")
    x = torch.randn(rows, 500, generator=torch.Generator().manual_seed(0))
    # So large that threads pick up the last panels of one row as they come; 200 rows of the other one suffice for that.
    deep = oracle.random_weight(520, 16384, 128)
    long = torch.randn(1, 16384, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7, 16):
            torch.set_num_threads(threads)
            results.append((run(x, weight, compute), run(x[:1], weight, compute), run(long, deep, compute)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for each in results for a, b in zip(each, results[0], strict=True))


def test_the_same_bits_alone_and_in_a_batch(isa: str) -> None:
    weight = oracle.random_weight(50, 300, 32, "integer")
    x = torch.randn(70, 300, generator=torch.Generator().manual_seed(0))
    for compute in ("int8", "int8x2"):
        y = run(x, weight, compute)
        for row in (0, 1, 35, 69):
            assert torch.equal(run(x[row : row + 1], weight, compute), y[row : row + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_set_gives_the_bits_of_the_reference(kind: str) -> None:
    weight = oracle.random_weight(47, 333, 128, kind)
    x = torch.randn(9, 333, generator=torch.Generator().manual_seed(0))
    for compute in ("int8", "int8x2", "fp32"):
        ops.set_isa("reference")
        expected = run(x, weight, compute)
        for name in ops.isas():
            ops.set_isa(name)
            assert torch.equal(run(x, weight, compute), expected), (name, compute)
    ops.set_isa("")


# The published tables. NF4: QLoRA, appendix E. E2M1: OCP Microscaling formats, table 5.
NF4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]  # fmt: skip
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
BNB_FP4 = [sign * value / 192 for sign in (1, -1) for value in (0, 1, 128, 192, 64, 96, 32, 48)]


@pytest.mark.parametrize(("codebook", "values"), [("nf4", NF4), ("fp4", E2M1), ("bnb_fp4", BNB_FP4)])
@pytest.mark.parametrize("compute", ["int8", "int8x2", "fp32"])
def test_code_books(isa: str, codebook: str, values: list[float], compute: str) -> None:
    for rows, n, k, group_size in ((1, 33, 100, 32), (2, 16, 300, 128), (9, 40, 64, -1)):
        weight = oracle.random_weight(n, k, group_size, codebook=codebook)
        index = torch.arange(k) * 0 if group_size == -1 else torch.arange(k) // group_size
        dense = weight.scales.double()[:, index] * torch.tensor(values).double()[weight.codes.long()]
        torch.testing.assert_close(weight.dequantize().double(), dense, rtol=1e-6, atol=1e-9)
        linear = Int4Linear.from_weight(weight, compute=compute)
        torch.testing.assert_close(linear.dequantize().double(), dense, rtol=1e-6, atol=1e-9)
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
        bound = {"int8": 1.5e-2, "int8x2": 2e-4 if codebook == "fp4" else 8e-3, "fp32": 1e-6}[compute]
        assert oracle.scaled_error(linear(x), x.double() @ dense.T) < bound, (rows, n, k)
        assert torch.equal(linear.to_weight().codes, weight.codes)


def test_shared_exponents(isa: str) -> None:
    """MXFP4: E2M1 codes with a power of two per 32 inputs."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (20, 96), dtype=torch.uint8, generator=g)
    exponents = torch.randint(100, 140, (20, 3), dtype=torch.uint8, generator=g)
    weight = Int4Weight(codes, exponents, group_size=32, codebook="fp4").validate()
    dense = torch.tensor(E2M1).double()[codes.long()] * 2.0 ** (exponents.double() - 127).repeat_interleave(32, 1)
    assert torch.equal(weight.dequantize().double(), dense)
    x = torch.randn(3, 96, generator=g)
    assert oracle.scaled_error(run(x, weight, "fp32"), x.double() @ dense.T) < 1e-6
    assert oracle.scaled_error(run(x, weight), x.double() @ dense.T) < 2e-2
    assert Int4Linear.from_weight(weight).nbytes == 32 * 96 // 2 + 32 * 3
