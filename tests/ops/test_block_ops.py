"""The operators of a decoder layer against the separate steps that they replace, on every kernel set."""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import pytest
import torch
from layer_problems import (
    ACTIVATIONS,
    COMPUTE,
    DTYPES,
    NORMS,
    OPS,
    assert_near,
    linears,
    lists,
    normalized,
    options_of,
    random,
    tolerance,
)
from torch import Tensor

from torch_int4 import Int4Error, Int4Linear, ops


@pytest.mark.parametrize(("norm", "eps", "offset", "biased"), NORMS)
@pytest.mark.parametrize("inputs", [1, 33, 64, 130])
def test_norm_linears(isa: str, norm: str, eps: float, offset: float, biased: bool, inputs: int) -> None:
    for dtype, compute, rows in itertools.product(DTYPES, COMPUTE, (1, 3, 21)):
        modules = linears([(20, inputs), (1, inputs), (33, inputs)], perm=rows == 3)
        x = random(rows, inputs, dtype=dtype) * 3 + 1
        weight, bias = random(inputs, dtype=dtype, seed=1), random(inputs, dtype=dtype, seed=2) if biased else None
        options = options_of(modules, compute)
        chosen = {"norm": norm, "eps": eps, "norm_offset": offset}
        got = OPS.norm_linears(x, weight, bias, *lists(modules), modules[0].perm, **options, **chosen)
        y = normalized(x, weight, bias, norm, eps, offset)
        if norm == "layer" and inputs == 1:
            y = torch.zeros_like(x) if bias is None else bias.expand_as(x).contiguous()  # no variance
        for out, module in zip(got, modules, strict=True):
            want = module(y)
            if want.count_nonzero():
                assert_near(out, want, tolerance(dtype, compute))


def test_norms_have_the_same_bits_on_every_kernel_set(isa: str) -> None:
    for (norm, eps, offset, _), inputs, dtype in itertools.product(NORMS, (1, 15, 70, 576), DTYPES):
        modules = linears([(24, inputs)])
        x, weight = random(5, inputs, dtype=dtype), random(inputs, dtype=dtype, seed=1)
        x[1], x[2, -1], x[3, 0] = 0, float("nan"), float("inf")
        for compute in ("int8", "int8x2", "fp32"):
            arguments = (x, weight, None, *lists(modules))
            options = {**options_of(modules, compute), "norm": norm, "eps": eps, "norm_offset": offset}
            (got,) = OPS.norm_linears(*arguments, **options)
            ops.set_isa("reference")
            (want,) = OPS.norm_linears(*arguments, **options)
            ops.set_isa(isa)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_add_gives_the_bits_of_a_product_and_a_sum(isa: str, dtype: torch.dtype, compute: str) -> None:
    for (rows, inputs), tokens in itertools.product([(1, 1), (16, 32), (47, 70), (64, 130)], (1, 2, 5, 19)):
        for perm in (False, True):
            (module,) = linears([(rows, inputs)], perm=perm)
            options = {**options_of([module], compute), "out_features": rows}
            x, residual = random(2, tokens, inputs, dtype=dtype), random(2, tokens, rows, dtype=dtype, seed=1) * 100
            x[0, 0, 0], residual[-1, -1, -1] = float("nan"), float("inf")
            own = (module.packed, module.packed_scales, module.packed_offsets, module.bias, module.perm)
            got = OPS.linear_add(x, residual, *own, **options)
            torch.testing.assert_close(got, residual + module(x), rtol=0, atol=0, equal_nan=True)
            strided = residual.transpose(0, 1).contiguous().transpose(0, 1)
            torch.testing.assert_close(OPS.linear_add(x, strided, *own, **options), got, rtol=0, atol=0, equal_nan=True)


def separate_mlp(x: Tensor, residual: Tensor | None, modules: list[Int4Linear], activation: str) -> Tensor:
    gate, up, down = modules
    y = down(ACTIVATIONS[activation](gate(x)) * up(x))
    return y if residual is None else residual + y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (33, 17), (64, 104), (70, 200)])
def test_mlp(isa: str, activation: str, hidden: int, inner: int) -> None:
    sizes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    for dtype, compute, rows in itertools.product(DTYPES, COMPUTE, (1, 3, 21)):
        modules = linears(sizes, perm=rows != 3)
        x, weight = random(rows, hidden, dtype=dtype) * 2, random(hidden, dtype=dtype, seed=1)
        residual = random(rows, hidden, dtype=dtype, seed=3) if rows != 1 else None
        perms, options = (modules[0].perm, modules[2].perm), options_of(modules, compute)
        got = OPS.mlp(x, residual, None, None, *lists(modules), *perms, activation=activation, **options)
        assert_near(got, separate_mlp(x, residual, modules, activation), tolerance(dtype, compute))
        got = OPS.mlp(x, x, weight, None, *lists(modules), *perms, activation=activation, eps=1e-5, **options)
        y = normalized(x, weight, None, "rms", 1e-5, 0.0)
        assert_near(got, separate_mlp(y, x, modules, activation), tolerance(dtype, compute))


@pytest.mark.parametrize(("dtype", "gated"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)])
def test_mlp_of_many_rows_runs_in_passes(dtype: torch.dtype, gated: bool) -> None:
    """More rows than scratch memory takes at once: 32 MiB, of 16384 gates and ups a row."""
    inner, pass_rows = 16384, 256 if gated and dtype == torch.float32 else 512
    modules = linears([(inner, 32)] * (1 + gated) + [(32, inner)], perm=True)
    x, residual = random(pass_rows + 44, 32, dtype=dtype), random(pass_rows + 44, 32, dtype=dtype, seed=1)
    perms, options = (modules[0].perm, modules[-1].perm), options_of(modules, "int8")
    got = OPS.mlp(x, residual, torch.ones(32, dtype=dtype), None, *lists(modules), *perms, **options)
    for rows in (slice(0, pass_rows - 3), slice(pass_rows - 3, pass_rows + 5), slice(pass_rows + 5, None)):
        part = OPS.mlp(x[rows], residual[rows], torch.ones(32, dtype=dtype), None, *lists(modules), *perms, **options)
        assert torch.equal(got[rows], part)


def unit_weight(place: tuple[int, int]) -> Int4Linear:
    """A linear of two inputs and outputs whose weight is one at a place and zero elsewhere."""
    codes = torch.full((2, 2), 8, dtype=torch.uint8)
    codes[place] = 9
    return Int4Linear.from_weight(oracle.Int4Weight(codes, torch.ones(2, 1), None, None, None, 32, 4, None))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_extreme_values(isa: str, activation: str) -> None:
    """The identity as gate, ones as up and the identity as down leave the activation itself."""
    values = torch.cat(
        [torch.linspace(-12, 12, 2001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88, -88, 1e4, -1e4, 3e38])]
    )
    x = torch.stack([values, torch.ones_like(values)], dim=1)
    modules = [unit_weight((0, 0)), unit_weight((0, 1)), unit_weight((0, 0))]
    got = OPS.mlp(x, None, None, None, *lists(modules), activation=activation, **options_of(modules, "fp32"))
    want = ACTIVATIONS[activation](values.double()).float()
    torch.testing.assert_close(got[:, 0], want, rtol=3e-6, atol=1e-6)
    assert got[want.isfinite(), 1].abs().max() == 0  # and infinity times zero is NaN


def test_clamped_swiglu(isa: str) -> None:
    """gpt-oss: gates up to 7, ups between -7 and 7; infinities and the largest values included."""
    values = torch.tensor([0.0, -0.0, 1e-30, 0.5, -0.5, 6.99, 7.0, 7.01, -7.0, -30.0, -200.0, 3e38, -3e38])
    gate, up = (each.flatten() for each in torch.meshgrid(values, values, indexing="ij"))
    limited = gate.double().clamp(max=7)
    want = limited * torch.sigmoid(1.702 * limited) * (up.double().clamp(-7, 7) + 1)
    modules = [unit_weight((0, 0)), unit_weight((0, 1)), unit_weight((0, 0))]
    x = torch.stack((gate, up), dim=1)
    options = options_of(modules, "fp32")
    got = OPS.mlp(x, None, None, None, *lists(modules), activation="clamped_swiglu", **options)
    torch.testing.assert_close(got[:, 0], want.float(), rtol=3e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="'clamped_swiglu' needs a gate and an up"):
        OPS.mlp(
            x, None, None, None, *lists(modules[1:]), activation="clamped_swiglu", **options_of(modules[1:], "fp32")
        )


@pytest.mark.parametrize("compute", COMPUTE)
def test_nan_stays_in_its_row(isa: str, compute: str) -> None:
    modules = linears([(40, 70), (40, 70), (70, 40)])
    x, weight = random(24, 70), random(70, seed=1)
    spoiled = x.clone()
    spoiled[5, 69], spoiled[11, 3] = float("nan"), float("inf")
    bad = torch.zeros(24, dtype=torch.bool)
    bad[[5, 11]] = True
    options = options_of(modules, compute)
    for norm in (None, weight):
        clean, got = (OPS.mlp(v, v, norm, None, *lists(modules), **options) for v in (x, spoiled))
        assert torch.equal(got[~bad], clean[~bad])
        assert got[5].isnan().all()
        assert not got[11].isfinite().all()
    shared = options_of(modules[:2], compute)
    clean, got = (OPS.norm_linears(v, weight, None, *lists(modules[:2]), **shared)[1] for v in (x, spoiled))
    assert torch.equal(got[~bad], clean[~bad])
    assert got[bad].isnan().all()


@pytest.mark.parametrize("kind", ["symmetric", "integer", "float"])
@pytest.mark.parametrize("bits", [4, 8])
def test_other_weights(isa: str, kind: str, bits: int) -> None:
    modules = linears([(40, 70), (40, 70), (70, 40)], kind, bits=bits, scale_dtype=torch.float32)
    x = random(2, 3, 70)
    got = OPS.mlp(x, x, None, None, *lists(modules), **options_of(modules, "fp32"))
    assert_near(got, separate_mlp(x, x, modules, "silu"), 1e-5)


def test_no_rows_and_a_single_dimension() -> None:
    modules = linears([(40, 70), (40, 70), (70, 40)])
    for shape in ((0, 70), (3, 0, 70), (70,)):
        x, options = random(*shape), options_of(modules, "int8")
        assert OPS.mlp(x, x, torch.ones(70), None, *lists(modules), **options).shape == shape
        got = OPS.norm_linears(x, torch.ones(70), None, *lists(modules[:2]), **options_of(modules[:2], "int8"))
        assert [y.shape for y in got] == [(*shape[:-1], 40)] * 2


def test_opcheck() -> None:
    modules = [module.requires_grad_(False) for module in linears([(40, 70), (40, 70), (70, 40)])]
    x, weight = random(2, 3, 70), random(70, seed=1)
    options = options_of(modules, "fp32")
    torch.library.opcheck(OPS.mlp.default, (x, x, weight, None, *lists(modules)), options)
    options = options_of(modules[:2], "fp32")
    torch.library.opcheck(OPS.norm_linears.default, (x, weight, None, *lists(modules[:2])), options)
    down = modules[2]
    own = (down.packed, down.packed_scales, down.packed_offsets, down.bias)
    options = {**options_of([down], "fp32"), "out_features": 70}
    torch.library.opcheck(OPS.linear_add.default, (random(2, 3, 40), x, *own), options)


def test_gradients_are_refused() -> None:
    modules = linears([(40, 70), (40, 70), (70, 40)])
    x = random(2, 70).requires_grad_()
    y = OPS.mlp(x, x, None, None, *lists(modules), **options_of(modules, "int8"))
    with pytest.raises(Int4Error, match="for inference"):
        y.sum().backward()
    y = OPS.norm_linears(x, torch.ones(70), None, *lists(modules[:1]), **options_of(modules[:1], "int8"))[0]
    with pytest.raises(Int4Error, match="for inference"):
        y.sum().backward()
    (square,) = linears([(70, 70)])
    own = (square.packed, square.packed_scales, square.packed_offsets)
    y = OPS.linear_add(x.detach(), x, *own, **{**options_of([square], "int8"), "out_features": 70})
    with pytest.raises(Int4Error, match="for inference"):
        y.sum().backward()


def test_bad_arguments_are_named() -> None:
    modules = linears([(40, 70), (40, 70), (70, 40)])
    weights, scales, offsets, biases = lists(modules)
    given: dict[str, Any] = {
        "x": random(2, 70), "residual": random(2, 70), "norm_weight": torch.ones(70), "norm_bias": None,
        "weights": weights, "scales": scales, "offsets": offsets, "biases": biases, **options_of(modules, "int8"),
    }  # fmt: skip

    def bad(message: str, **changes: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            OPS.mlp(**{**given, **changes})

    bad("residual has shape", residual=random(3, 70))
    bad("residual must be of the dtype of x", residual=random(2, 70).half())
    bad("norm_weight has shape", norm_weight=torch.ones(69))
    bad("norm_weight and x must have one dtype", norm_weight=torch.ones(70).half())
    bad("only norm='layer' has a norm_bias", norm_bias=torch.ones(70))
    bad("norm_bias needs a norm_weight", norm_weight=None, norm_bias=torch.ones(70))
    bad("norm='layer' has no norm_offset", norm="layer", norm_offset=1.0)
    bad("norm must be", norm="batch")
    bad("eps must not be negative", eps=-1.0)
    bad("activation must be", activation="tanh")
    bad("lists of three", weights=weights[:2])
    bad("but up has", out_features=[40, 39, 70])
    bad("weight has shape", out_features=[50, 50, 70])
    bad("perm has shape", perm=torch.arange(40))
    bad("perm has shape", down_perm=torch.arange(70))
    bad("x must be float32", x=random(2, 70).double(), residual=None, norm_weight=None)
