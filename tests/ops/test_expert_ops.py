"""The operators of experts against their linears one after the other, on every kernel set."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from layer_problems import ACTIVATIONS, COMPUTE, DTYPES, OPS, assert_near, linears, lists, options_of, random, tolerance
from torch import Tensor

from torch_int4 import Int4Error, Int4Linear, ops

COUNT = 5


def experts_of(inner: int, features: int, *, gated: bool, perm: bool = False, **options: Any) -> list[Int4Linear]:
    sizes = [(inner, features)] * (2 if gated else 1) + [(features, inner)]
    return linears(sizes * COUNT, perm=perm, **options)


def arguments(modules: list[Int4Linear], gated: bool, compute: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    each = 3 if gated else 2
    perms = [modules[i + at].perm for i in range(0, len(modules), each) for at in (0, each - 1)]
    options = options_of(modules, compute)
    options["out_features"] = options["out_features"][:each]
    return (*lists(modules), perms), options


def routed(rows: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distinct experts of each row, one of them none, and shares of them."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(COUNT + 1, generator=generator)[:top_k] for _ in range(rows)])
    return chosen, torch.rand(rows, top_k, generator=generator)


def by_linears(x: Tensor, chosen: Tensor, shares: Tensor, modules: list[Int4Linear], gated: bool, name: str) -> Tensor:
    each, activation = (3, ACTIVATIONS[name]) if gated else (2, ACTIVATIONS[name])
    y = torch.zeros(x.shape[0], modules[each - 1].out_features)
    for row, place in itertools.product(range(x.shape[0]), range(chosen.shape[1])):
        number = int(chosen[row, place])
        if number == COUNT:
            continue
        *first, down = modules[number * each :][:each]
        inner = [linear(x[row : row + 1]) for linear in first]
        middle = activation(inner[0]) * inner[1] if gated else activation(inner[0])
        y[row] += shares[row, place].float() * down(middle)[0].float()
    return y.to(x.dtype)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("compute", COMPUTE)
def test_experts_give_what_their_linears_do(isa: str, compute: str, gated: bool) -> None:
    for (inner, features), rows, dtype in itertools.product([(1, 33), (48, 64), (70, 130)], (1, 2, 9), DTYPES):
        modules = experts_of(inner, features, gated=gated, perm=rows == 2)
        x, (chosen, shares) = random(rows, features, dtype=dtype), routed(rows, 3, rows)
        tensors, options = arguments(modules, gated, compute)
        got = OPS.experts(x, chosen, shares.to(dtype), *tensors, **options, activation="gelu")
        assert got.shape == (rows, features)
        assert got.dtype == dtype
        want = by_linears(x, chosen, shares.to(dtype), modules, gated, "gelu")
        if want.count_nonzero():
            assert_near(got, want, 3 * tolerance(dtype, compute))


def test_experts_are_the_reference_on_every_kernel_set(isa: str) -> None:
    modules = experts_of(48, 70, gated=True)
    x, (chosen, shares) = random(21, 70), routed(21, 2)
    x[1], x[2, -1], x[3, 0] = 0, float("nan"), float("inf")
    for compute in ("int8", "int8x2", "fp32"):
        tensors, options = arguments(modules, True, compute)
        got = OPS.experts(x, chosen, shares, *tensors, **options)
        ops.set_isa("reference")
        want = OPS.experts(x, chosen, shares, *tensors, **options)
        ops.set_isa(isa)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)  # activations differ in last bits
        assert got[[0, *range(4, 21)]].isfinite().all()


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_row_has_the_same_bits_alone_and_among_others(isa: str, compute: str) -> None:
    modules = experts_of(80, 96, gated=True)
    x, (chosen, shares) = random(150, 96, dtype=torch.bfloat16), routed(150, 3)
    tensors, options = arguments(modules, True, compute)
    together = OPS.experts(x, chosen, shares, *tensors, **options)
    for row in (0, 7, 149):
        alone = OPS.experts(*(t[row : row + 1] for t in (x, chosen, shares)), *tensors, **options)
        assert torch.equal(alone[0], together[row])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(OPS.experts(x, chosen, shares, *tensors, **options), together)
    finally:
        torch.set_num_threads(threads)


def test_rows_without_experts_are_zero() -> None:
    modules = experts_of(32, 64, gated=True)
    tensors, options = arguments(modules, True, "int8")
    chosen = torch.full((4, 2), COUNT)
    chosen[2, 1] = 3
    y = OPS.experts(torch.ones(4, 64), chosen, torch.ones(4, 2), *tensors, **options)
    assert y[[0, 1, 3]].count_nonzero() == 0
    assert y[2].count_nonzero()
    empty = OPS.experts(torch.ones(0, 64), chosen[:0], torch.ones(0, 2), *tensors, **options)
    assert empty.shape == (0, 64)


def test_prepared_experts_are_those_that_were_prepared() -> None:
    modules = experts_of(32, 64, gated=False)
    (tensors, options), x, (chosen, shares) = arguments(modules, False, "int8"), random(3, 64), routed(3, 2)
    want = OPS.experts(x, chosen, shares, *tensors, **options)
    number = OPS.prepare_experts(*tensors, in_features=64, **options)
    assert torch.equal(OPS.prepared_experts(x, chosen, shares, number, 64), want)
    OPS.release_experts(number)
    with pytest.raises(RuntimeError, match=f"no prepared experts {number}"):
        OPS.prepared_experts(x, chosen, shares, number, 64)


def changed(place: int, value: Any) -> Any:
    return lambda given: (*given[:place], value, *given[place + 1 :])


REFUSED = {
    "an expert that is none": (changed(1, torch.tensor([[0, COUNT + 1]])), "expert 6 of 5"),
    "a negative one": (changed(1, torch.tensor([[-1, 0]])), "expert -1 of 5"),
    "chosen of another shape": (changed(1, torch.tensor([0, 1])), "chosen must be"),
    "no experts of a row": (changed(1, torch.zeros(1, 0, dtype=torch.int64)), "at least one"),
    "chosen of another type": (changed(1, torch.zeros(1, 2, dtype=torch.int32)), "chosen must be int64"),
    "chosen of other rows": (changed(1, torch.zeros(2, 2, dtype=torch.int64)), "chosen has shape"),
    "shares of other rows": (changed(2, torch.ones(1, 3)), "shares has shape"),
    "shares that are no floats": (changed(2, torch.ones(1, 2, dtype=torch.int64)), "shares must be float"),
    "other features": (changed(0, torch.ones(1, 32)), "weight|features"),
    "perms of fewer experts": (changed(7, [None] * 3), "perms must be a list of two"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_named(name: str) -> None:
    change, message = REFUSED[name]
    modules = experts_of(32, 64, gated=True)
    tensors, options = arguments(modules, True, "int8")
    given = (torch.ones(1, 64), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), *tensors)
    OPS.experts(*given, **options)
    with pytest.raises(RuntimeError, match=message):
        OPS.experts(*change(given), **options)
    with pytest.raises(RuntimeError, match="out_features but up has"):
        OPS.experts(*given, **{**options, "out_features": [32, 16, 64]})
    with pytest.raises(RuntimeError, match="out_features must be those"):
        OPS.experts(*given, **{**options, "out_features": [32]})


def test_shapes_and_gradients() -> None:
    modules = experts_of(32, 64, gated=True)
    tensors, options = arguments(modules, True, "int8")
    x, (chosen, shares) = random(3, 64), routed(3, 2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.experts.default, (x, chosen, shares, *tensors), options, test_utils=checks)
    with pytest.raises(Int4Error, match="inference"):
        OPS.experts(x.requires_grad_(), chosen, shares, *tensors, **options).sum().backward()
