"""rotary_append against plain PyTorch, for every kernel set that runs here."""

from __future__ import annotations

import itertools
from typing import Any

import attention_oracle
import pytest
import torch
from alone import survives
from attention_problems import CACHES, FLOATS, append_problem, refuses, states
from torch import Tensor

OPS = torch.ops.torch_int4


def stored(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x [B, T, H, D] as a cache of that type holds it, [B, H, T, D], and the scales."""
    x = x.transpose(1, 2).float()
    if dtype == torch.float16:
        return x.clamp(-65504, 65504).half(), None
    if dtype != torch.int8:
        return x.to(dtype), None
    scales = x.abs().amax(-1) / 127
    codes = (x / scales[..., None]).round().nan_to_num().to(torch.int8)
    return codes, scales


def check_append(arguments: dict[str, Any]) -> None:
    before = {n: t.clone() for n, t in arguments.items() if isinstance(t, Tensor)}
    rotated = OPS.rotary_append(**arguments)
    angles = (arguments["cos"], arguments["sin"], arguments["rotary_dim"], arguments.get("interleaved", False))
    query, key = arguments["query"], arguments["key"]
    if arguments["rotary_dim"]:
        query, key = (attention_oracle.rotate(x, *angles) for x in (query, key))
    assert rotated.dtype == query.dtype
    assert rotated.is_contiguous()
    assert torch.equal(rotated, query)
    start, tokens = int(before["length"]), query.shape[1]
    assert int(arguments["length"]) == start + tokens
    for name, x in (("key", key), ("value", arguments["value"])):
        got = arguments[f"{name}_cache"]
        expected, scales = stored(x, got.dtype)
        inside = got[:, :, start : start + tokens]
        if scales is None:
            assert torch.equal(inside, expected)
        else:
            torch.testing.assert_close(arguments[f"{name}_scales"][:, :, start : start + tokens], scales)
            assert (inside.int() - expected.int()).abs().max() <= 1
            assert (inside == expected).double().mean() > 0.9  # ties between two codes
        for rest in (slice(0, start), slice(start + tokens, None)):
            assert torch.equal(got[:, :, rest], before[f"{name}_cache"][:, :, rest])


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_append(isa: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    for tokens, dim, value_dim in ((1, 64, 64), (3, 80, 64), (2, 20, 33), (9, 128, 128), (1, 6, 1)):
        for interleaved in (False, True):
            arguments = append_problem(
                tokens=tokens, dim=dim, value_dim=value_dim, dtype=dtype, cache_dtype=cache_dtype, angle_dtype=dtype
            )
            check_append({**arguments, "interleaved": interleaved})


@pytest.mark.parametrize("rotary_dim", [0, 2, 16, 34, 50])
def test_partial_rotation(isa: str, rotary_dim: int) -> None:
    for interleaved, half in itertools.product((False, True), (False, True)):
        arguments = append_problem(dim=50, rotary_dim=rotary_dim)
        if rotary_dim and half:
            arguments.update({n: arguments[n][:1, :, : rotary_dim // 2] for n in ("cos", "sin")})
        check_append({**arguments, "interleaved": interleaved})


def test_append_of_views_of_a_fused_projection(isa: str) -> None:
    for dtype in FLOATS:
        fused = states(2, 3, 8, 64, dtype=dtype)
        query, key, value = fused.split((4, 2, 2), 2)
        check_append({**append_problem(dtype=dtype), "query": query, "key": key, "value": value})


def test_float16_caches_are_clamped(isa: str) -> None:
    arguments = append_problem(cache_dtype=torch.float16)
    arguments["key"] *= 1e6
    arguments["value"] *= 1e6
    check_append(arguments)
    assert arguments["key_cache"].isfinite().all()


def test_nan_stays_in_its_token_of_an_int8_cache(isa: str) -> None:
    for bad in (torch.nan, torch.inf):
        arguments = append_problem(cache_dtype=torch.int8)
        arguments["value"][1, 1, 0, 3] = bad
        OPS.rotary_append(**arguments)
        scales = arguments["value_scales"]
        assert scales[1, 0, 6].isnan()
        assert scales.isnan().sum() == 1
        assert not arguments["key_scales"].isnan().any()


def test_appending_token_by_token_is_appending_all(isa: str) -> None:
    together = append_problem(1, 6, cache_dtype=torch.bfloat16, length=0)
    alone = append_problem(1, 6, cache_dtype=torch.bfloat16, length=0)
    expected = OPS.rotary_append(**together)
    for t in range(6):
        step = {n: alone[n][:, t : t + 1] for n in ("query", "key", "value", "cos", "sin")}
        assert torch.equal(OPS.rotary_append(**{**alone, **step}), expected[:, t : t + 1])
    assert torch.equal(alone["key_cache"], together["key_cache"])
    assert torch.equal(alone["value_cache"], together["value_cache"])


def test_a_full_cache_is_an_error_and_stays_as_it_was() -> None:
    arguments = append_problem(tokens=3, length=14, capacity=16)
    before = arguments["key_cache"].clone()
    with pytest.raises(RuntimeError, match=r"holds 14 of 16 tokens \(its capacity\); 3 more do not fit"):
        OPS.rotary_append(**arguments)
    assert torch.equal(arguments["key_cache"], before)
    assert int(arguments["length"]) == 14


def test_lengths_that_no_sum_holds() -> None:
    survives(
        """
import torch, torch_int4
from attention_problems import append_problem, refuses
for length in (2**63 - 1, 2**63 - 3, 14, -1, -2**63):
    a = append_problem(tokens=3, capacity=16, length=length)
    refuses(torch.ops.torch_int4.rotary_append, a, f"length says that the cache holds {length} of 16 tokens")
    assert a["length"].item() == length and (a["key_cache"] == 77).all() and (a["value_cache"] == 77).all()
"""
    )


def test_tensors_without_their_memory_are_named() -> None:
    survives(
        """
import torch, torch_int4
from alone import shortened
from attention_problems import append_problem, refuses
a = append_problem(cache_dtype=torch.int8)
for name, t in a.items():
    if isinstance(t, torch.Tensor):
        said = f"the storage of {name} .* was resized"
        refuses(torch.ops.torch_int4.rotary_append, a, said, **{name: shortened(t)})
"""
    )


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_opcheck(cache_dtype: torch.dtype) -> None:
    torch.library.opcheck(OPS.rotary_append.default, (), append_problem(cache_dtype=cache_dtype))


def test_bad_arguments_of_rotary_append_are_named() -> None:
    a = append_problem()
    op = OPS.rotary_append
    refuses(op, a, "key and query must have one dtype", key=a["key"].half())
    refuses(op, a, "key has shape", key=torch.zeros(2, 4, 2, 64))
    refuses(op, a, "number of heads of key", value=torch.zeros(2, 3, 1, 64))
    refuses(op, a, "head size of query", key=torch.zeros(2, 3, 2, 32))
    refuses(op, a, "cos and sin go with a positive rotary_dim", cos=None)
    refuses(op, a, "cos and sin go with a positive rotary_dim", rotary_dim=0)
    refuses(op, a, "rotary_dim must be even", rotary_dim=66)
    refuses(op, a, "rotary_dim must be even", rotary_dim=3)
    refuses(op, a, "cos has shape", cos=torch.zeros(2, 3, 30))
    refuses(op, a, "number of tokens", sin=torch.zeros(2, 2, 64))
    refuses(op, a, "sin and cos must have one dtype", sin=a["sin"].half())
    refuses(op, a, "key_cache has shape", key_cache=torch.zeros(2, 2, 16, 32))
    refuses(op, a, "key_cache must be contiguous", key_cache=torch.zeros(2, 16, 2, 64).transpose(1, 2))
    refuses(op, a, "value_cache and key_cache must have one dtype", value_cache=a["value_cache"].half())
    refuses(op, a, "capacity of key_cache", value_cache=torch.zeros(2, 2, 15, 64))
    refuses(op, a, "key_scales must be None", key_scales=torch.zeros(2, 2, 16))
    refuses(op, append_problem(cache_dtype=torch.int8), "value_scales must be given", value_scales=None)
    refuses(op, a, "length must be int64", length=torch.tensor([1.0]))
    huge = torch.empty(2, 3, 0, 2**40)  # of no heads, so that there is no memory
    caches = {f"{name}_cache": torch.empty(2, 0, 16, 2**40) for name in ("key", "value")}
    refuses(op, a, "query has heads of", query=huge, key=huge, value=huge, **caches)
