"""The operators as PyTorch sees them: schemas, fake kernels, gradients, compilation, bad arguments, kernel choice."""

from __future__ import annotations

import oracle
import pytest
import torch
from alone import run_alone, survives
from torch import Tensor

import torch_int4
from torch_int4 import Int4Error, Int4Linear, ops
from torch_int4.nn.shared_input import merge_inputs
from torch_int4.ops.fakes import fake

OPS = torch.ops.torch_int4


def packed(rows: int = 40, inputs: int = 70, group_size: int = 32, kind: str = "float") -> list[Tensor | None]:
    linear = Int4Linear.from_weight(oracle.random_weight(rows, inputs, group_size, kind))
    return [linear.packed, linear.packed_scales, linear.packed_offsets]


@pytest.mark.parametrize("kind", ["symmetric", "integer", "float"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_int4_linear(kind: str, requires_grad: bool) -> None:
    x = torch.randn(2, 3, 70, requires_grad=requires_grad)
    bias = torch.randn(40, requires_grad=requires_grad)
    options = {"out_features": 40, "group_size": 32, "compute": "fp32"}
    torch.library.opcheck(OPS.int4_linear.default, (x, *packed(kind=kind), bias, None), options)


def test_opcheck_int4_linears() -> None:
    x = torch.randn(3, 70)
    w, s, o = packed()
    lists = ([w, w], [s, s], [o, o], [torch.randn(40), None])
    options = {"out_features": [40, 40], "group_size": 32, "compute": "fp32"}
    torch.library.opcheck(OPS.int4_linears.default, (x, *lists), options)


@pytest.mark.parametrize("kind", ["symmetric", "integer", "float"])
def test_opcheck_pack_unpack_dequantize(kind: str) -> None:
    weight = oracle.random_weight(40, 70, 32, kind)
    arguments = (weight.codes, weight.scales, weight.zeros, weight.offsets)
    torch.library.opcheck(OPS.pack.default, arguments, {"group_size": 32})
    shape = {"out_features": 40, "in_features": 70, "group_size": 32}
    torch.library.opcheck(OPS.unpack.default, tuple(packed(kind=kind)), shape)
    torch.library.opcheck(OPS.dequantize.default, (*packed(kind=kind), None), shape)


def test_rules_of_fake_kernels_name_arguments_that_there_are() -> None:
    with pytest.raises(ValueError, match="torch_int4::linear_add has no argument bits"):
        fake("linear_add")(lambda x, bits: x)


def test_fake_kernels_take_what_schemas_take() -> None:
    """By place or by name, with defaults or without."""
    weight, (w, s, o) = oracle.random_weight(40, 70, 32, "float"), packed()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 70)
        shape = {"out_features": 40, "in_features": 70, "group_size": 32}
        for dtype in (torch.float32, torch.bfloat16):
            options = {} if dtype == torch.float32 else {"dtype": dtype}
            dense = OPS.dequantize(w, scales=s, offsets=o, perm=None, **shape, **options)
            assert dense.shape == (40, 70)
            assert dense.dtype == dtype
        y = OPS.int4_linear(weight=w, x=x, scales=s, out_features=40, group_size=32, out_dtype=torch.float16)
        assert y.shape == (2, 3, 40)
        assert y.dtype == torch.float16
        codes, scales, offsets = OPS.pack(weight.codes, weight.scales, offsets=weight.offsets, group_size=32)
        assert [t.shape for t in (codes, scales, offsets)] == [t.shape for t in (w, s, o) if t is not None]


def test_gradients_are_those_of_the_dequantized_weight() -> None:
    weight = oracle.random_weight(24, 70, 32, "integer")
    linear = Int4Linear.from_weight(weight, torch.randn(24))
    x = torch.randn(2, 5, 70, requires_grad=True)
    upstream = torch.randn(2, 5, 24)
    linear(x).backward(upstream)
    assert x.grad is not None
    assert linear.bias.grad is not None
    torch.testing.assert_close(x.grad, upstream @ weight.dequantize())
    torch.testing.assert_close(linear.bias.grad, upstream.sum((0, 1)))


def test_several_linears_on_one_input_refuse_gradients() -> None:
    w, s, o = packed(24)
    x = torch.randn(5, 70, requires_grad=True)
    y = OPS.int4_linears(x, [w, w], [s, s], [o, o], [None, None], out_features=[24, 24], group_size=32)
    with pytest.raises(Int4Error, match="call int4_linear for each"):
        y[0].sum().backward()


def test_several_linears_on_one_input_give_the_bits_of_each() -> None:
    weights = [oracle.random_weight(n, 70, 32, kind, seed=n) for n, kind in ((24, "integer"), (33, "integer"))]
    linears = [Int4Linear.from_weight(w, torch.randn(w.out_features)) for w in weights]
    for rows, compute in ((1, "int8"), (3, "fp32"), (40, "int8x2")):
        x = torch.randn(rows, 70)
        for linear in linears:
            linear.compute = compute
        alone = [linear(x) for linear in linears]
        assert merge_inputs(linears)
        together = [linear(x) for linear in linears]
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        for linear in linears:
            linear._shared = None


def test_compile_without_graph_breaks() -> None:
    model = torch.nn.Sequential(
        Int4Linear.from_weight(oracle.random_weight(48, 70, 32)),
        torch.nn.ReLU(),
        Int4Linear.from_weight(oracle.random_weight(20, 48, -1, "float"), torch.randn(20)),
    )
    x = torch.randn(3, 70)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_export_with_dynamic_rows() -> None:
    linear = Int4Linear.from_weight(oracle.random_weight(20, 64, 32))
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(linear, (torch.randn(4, 64),), dynamic_shapes=({0: rows},))
    x = torch.randn(9, 64)
    assert torch.equal(program.module()(x), linear(x))


def bad(message: str, **changes: object) -> None:
    w, s, o = packed()
    arguments: dict[str, object] = {
        "x": torch.randn(2, 70), "weight": w, "scales": s, "offsets": o, "bias": None, "perm": None,
        "out_features": 40, "group_size": 32, "weight_type": "int4", "compute": "int8",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        OPS.int4_linear(**{**arguments, **changes})


def test_bad_arguments_are_named() -> None:
    bad("weight has shape", x=torch.randn(2, 71 + 32))
    bad("x must be float32", x=torch.zeros(2, 70, dtype=torch.int32), out_dtype=torch.float32)
    bad("x must have at least one dimension", x=torch.tensor(1.0))
    bad("weight must be uint8", weight=torch.zeros(3, 12, 64))
    bad("weight has shape", out_features=50)
    bad("group_size must be", group_size=48)
    bad("group_size must be", group_size=0)
    bad("group_size must be", group_size=192)
    bad("scales must be", scales=torch.zeros(3, 3, 16, dtype=torch.float64))
    bad("scales has shape", group_size=64)
    bad("offsets must be", offsets=torch.zeros(3, 3, 16, dtype=torch.float64))
    bad("bias has shape", bias=torch.zeros(41))
    bad("bias must be float32", bias=torch.zeros(40, dtype=torch.float64))
    bad("weight_type must be", weight_type="int3")
    bad("compute must be", compute="fp8")
    bad("perm has shape", perm=torch.arange(69))
    bad("perm must hold indices", perm=torch.arange(70) + 1)
    bad("must be contiguous", weight=torch.zeros(12, 3, 64, dtype=torch.uint8).transpose(0, 1))


@pytest.mark.parametrize("features", [2**31, 2**60 + 32, 2**63 - 1])
def test_sizes_whose_products_no_number_holds(features: int) -> None:
    """Bytes of a panel that wrap around to few or none would make any tensor a weight."""
    w, s, o = packed()
    nothing = torch.empty(3, 0, 64, dtype=torch.uint8)
    one_group = torch.ones(3, 1, 16)
    for weight, scales, offsets in ((w, s, o), (nothing, one_group, None)):
        for shape in ({"out_features": 40, "in_features": features}, {"out_features": features, "in_features": 70}):
            for operator, more in ((OPS.unpack, ()), (OPS.dequantize, (None,))):
                with pytest.raises(RuntimeError, match=f"{features} .*too large"):
                    operator(weight, scales, offsets, *more, **shape, group_size=-1)
    with pytest.raises(RuntimeError, match="too large"):
        OPS.int4_linear(torch.empty(0, features), nothing, one_group, out_features=40, group_size=-1)


def test_tensors_without_their_memory_are_named() -> None:
    """A storage may be resized under the tensors that view it."""
    survives(
        """
import pytest, torch
from alone import shortened
from test_ops import OPS, packed
given = dict(zip(("weight", "scales", "offsets"), packed()), x=torch.ones(2, 70), bias=torch.ones(40))
given["perm"] = torch.arange(70)
for name, t in [*given.items(), ("x", torch.ones(70, 2).T)]:
    with pytest.raises(RuntimeError, match=f"the storage of {name} .* was resized"):
        OPS.int4_linear(**{**given, name: shortened(t)}, out_features=40, group_size=32)
"""
    )


def test_pack_refuses_codes_above_15() -> None:
    codes = torch.full((4, 32), 16, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="from 0 to 15"):
        OPS.pack(codes, torch.ones(4, 1), group_size=32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "integer", "float"])
def test_unpack_gives_back_every_bit(bits: int, kind: str) -> None:
    for rows, inputs, group_size in ((1, 1, 32), (16, 32, 32), (17, 33, -1), (47, 300, 128)):
        for dtype in (torch.float16, torch.float32):
            weight = oracle.random_weight(rows, inputs, group_size, kind, bits=bits, scale_dtype=dtype)
            linear = Int4Linear.from_weight(weight)
            again = linear.to_weight()
            for name in ("codes", "scales", "zeros", "offsets"):
                before, after = getattr(weight, name), getattr(again, name)
                assert (before is None and after is None) or torch.equal(before, after), name
            exact = oracle.dense(weight).float()
            torch.testing.assert_close(linear.dequantize(), exact, rtol=1e-6, atol=1e-9)


def test_info_names_the_kernels(isa: str) -> None:
    info = torch_int4.info()
    assert info["isa"] == isa
    assert isa in info["available"]
    assert "reference" in info["built"]


@pytest.mark.parametrize("name", ops.isas())
def test_the_environment_forces_a_kernel_set(name: str) -> None:
    result = run_alone("import torch_int4; print(torch_int4.info()['isa'])", TORCH_INT4_ISA=name)
    assert result.stdout.strip() == name, result.stderr


def test_an_unknown_kernel_set_is_an_error() -> None:
    result = run_alone("import torch_int4; torch_int4.info()", TORCH_INT4_ISA="avx3")
    assert result.returncode != 0
    assert "TORCH_INT4_ISA=avx3 is unknown" in result.stderr
    assert "reference" in result.stderr
    with pytest.raises(Int4Error, match="is unknown"):
        ops.set_isa("avx3")
