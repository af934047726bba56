"""attention against plain PyTorch, for every kernel set that runs here."""

from __future__ import annotations

import itertools
from typing import Any

import attention_oracle
import pytest
import torch
from attention_problems import CACHES, FLOATS, append_problem, problem, refuses, states
from torch import Tensor

from torch_int4 import Int4Error

OPS = torch.ops.torch_int4
# Relative error of a result: float32 arithmetic, then rounding to the type of the query.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def check(arguments: dict[str, Any]) -> Tensor:
    y = OPS.attention(**arguments)
    expected = attention_oracle.attention(**arguments)
    query = arguments["query"]
    assert y.dtype == query.dtype
    assert y.shape == (*query.shape[:-1], arguments["value"].shape[-1])
    assert y.is_contiguous()
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    return y


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_types_heads_and_lengths(isa: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    groups = [(4, 4), (4, 2), (8, 1), (20, 1)]
    for i, (tokens, keys) in enumerate(itertools.product((1, 2, 5, 17), (1, 127, 128, 129, 1000))):
        heads, kv_heads = groups[i % 4]
        check(problem(1 + i % 2, tokens, heads, kv_heads, 64, keys, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("dim", [1, 15, 20, 33, 64, 80, 96, 128, 256])
def test_head_sizes(isa: str, dim: int, cache_dtype: torch.dtype) -> None:
    for tokens, keys, value_dim in ((1, 70, dim), (3, 530, dim + 7), (40, 70, dim), (17, 33, 16)):
        check(problem(1, tokens, 4, 2, dim, keys, value_dim=value_dim, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
def test_prompts(isa: str, cache_dtype: torch.dtype) -> None:
    for heads, kv_heads, keys in ((2, 2, 130), (6, 2, 200), (3, 1, 131)):
        arguments = problem(1, 130, heads, kv_heads, 32, keys, cache_dtype=cache_dtype)
        check(arguments)
        check({**arguments, "causal": False})


def test_spans_of_many_rows_are_merged(isa: str) -> None:
    for tokens, heads in ((1, 20), (40, 1)):
        arguments = problem(1, tokens, heads, 1, 16, 4200)
        for options in ({}, {"window": 1000}, {"length": torch.tensor([2049])}):
            check({**arguments, **options})


@pytest.mark.parametrize("tokens", [1, 3, 5, 40])
@pytest.mark.parametrize("length", [0, 1, 37, 127, 200])
def test_length_hides_what_lies_behind_it(isa: str, tokens: int, length: int) -> None:
    arguments = problem(2, tokens, 4, 2, 48, 200)
    arguments["key"][:, :, length:] = torch.nan
    arguments["value"][:, :, length:] = torch.nan
    for causal in (True, False):
        check({**arguments, "length": torch.tensor([length]), "causal": causal})


def masks(batch: int, heads: int, tokens: int, columns: int) -> list[Tensor]:
    shown = torch.rand(batch, heads, tokens, columns, generator=torch.Generator().manual_seed(3)) < 0.6
    padded = torch.ones(batch, 1, 1, columns, dtype=torch.bool)
    padded[0, ..., :70] = False  # left padding
    nothing = shown.clone()
    nothing[:, 0, 0] = False
    added = states(batch, 1, tokens, columns, seed=4).masked_fill(~shown[:, :1], -torch.inf)
    lowest = [torch.where(shown[:, :1], 0.0, torch.finfo(t).min).to(t) for t in FLOATS]
    wide = torch.rand(batch, heads, tokens, columns + 9) < 0.5
    return [shown, padded, nothing, added, *lowest, added.half(), shown[:1, :1, :1], wide[..., :columns], wide]


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 70])
def test_masks(isa: str, tokens: int, cache_dtype: torch.dtype) -> None:
    arguments = problem(2, tokens, 4, 2, 32, 600, cache_dtype=cache_dtype)
    for mask in masks(2, 4, tokens, 600):
        for options in ({"causal": True}, {"causal": False}, {"causal": False, "window": 100}):
            check({**arguments, **options, "mask": mask})


def test_rows_that_see_no_key_are_zeros(isa: str) -> None:
    for tokens in (1, 40):
        arguments = problem(1, tokens, 4, 2, 32, 600)
        hidden = torch.zeros(1, 1, 1, 600, dtype=torch.bool)
        for mask in (hidden, torch.where(hidden, 0.0, -torch.inf), torch.where(hidden, 0.0, torch.finfo().min)):
            assert check({**arguments, "mask": mask}).abs().max() == 0
        assert check({**arguments, "length": torch.tensor([0])}).abs().max() == 0


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("keys", [60, 700])
def test_window_softcap_and_alibi(isa: str, tokens: int, keys: int) -> None:
    arguments = problem(2, tokens, 4, 2, 64, keys)
    slopes = torch.tensor([0.5, 0.25, 0.0, 2.0**-8])
    for window in (1, 7, 64, 5000):
        check({**arguments, "window": window})
    check({**arguments, "window": 30, "causal": False})
    for softcap in (0.5, 30.0):
        check({**arguments, "softcap": softcap, "scale": 2.0})
    check({**arguments, "alibi_slopes": slopes})
    check({**arguments, "alibi_slopes": torch.stack((slopes, slopes.flip(0)))})
    mask = masks(2, 4, tokens, keys)[0]
    check({**arguments, "alibi_slopes": slopes, "softcap": 20.0, "window": 33, "mask": mask})


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("keys", [60, 700, 2100])
def test_sinks(isa: str, tokens: int, keys: int, cache_dtype: torch.dtype) -> None:
    """A score without a value, far below the others, among them and far above; of any float type."""
    arguments = problem(2, tokens, 4, 2, 64, keys, cache_dtype=cache_dtype)
    plain = OPS.attention(**arguments)
    sinks = torch.tensor([-3.0, 0.5, 4.0, 20.0])
    for dtype in FLOATS:
        check({**arguments, "sinks": sinks.to(dtype)})
    check({**arguments, "sinks": sinks, "window": 30, "softcap": 5.0, "mask": masks(2, 4, tokens, keys)[2]})
    far = OPS.attention(**arguments, sinks=torch.tensor([-torch.inf, -1e30, 1e30, torch.inf]))
    assert torch.equal(far[:, :, :2], plain[:, :, :2])
    assert far[:, :, 2:].abs().max() == 0
    hidden = torch.zeros(1, 1, 1, keys, dtype=torch.bool)
    assert OPS.attention(**{**arguments, "mask": hidden}, sinks=sinks).abs().max() == 0


@pytest.mark.parametrize("tokens", [1, 6, 33])
def test_strides(isa: str, tokens: int) -> None:
    """Views of a fused projection, and keys that are transposed projections instead of a cache."""
    batch, heads, kv_heads, dim = 2, 6, 2, 48
    fused = states(batch, tokens, heads + 2 * kv_heads, dim)
    query, key, value = fused.split((heads, kv_heads, kv_heads), 2)
    arguments = {**problem(), "query": query, "key": key.transpose(1, 2), "value": value.transpose(1, 2)}
    y = check(arguments)
    plain = {name: t.contiguous() if isinstance(t, Tensor) else t for name, t in arguments.items()}
    assert torch.equal(y, OPS.attention(**plain))
    wide = problem(batch, tokens, heads, kv_heads, dim, 90, cache_dtype=torch.int8)
    narrow = {**wide, **{n: wide[n][:, :, 5:80] for n in ("key", "value", "key_scales", "value_scales")}}
    check(narrow)


def extremes(arguments: dict[str, Any]) -> None:
    """Scores far apart, where a softmax without its maximum overflows."""
    arguments["query"] *= 1e3
    arguments["key"] *= 1e2


@pytest.mark.parametrize("tokens", [1, 40])
def test_large_scores(isa: str, tokens: int) -> None:
    arguments = problem(1, tokens, 4, 2, 32, 1100)
    extremes(arguments)
    y = OPS.attention(**arguments)
    # float32 rounds scores of 1e6 to 0.06: compare where one key takes it all.
    expected = attention_oracle.attention(**arguments)
    clear = expected.isfinite().all(-1)
    assert y.isfinite().all()
    close = ((y.double() - expected).abs().amax(-1) < 0.2)[clear].double().mean()
    assert close > 0.9


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_nan_stays_with_the_rows_that_see_it(isa: str, tokens: int, cache_dtype: torch.dtype) -> None:
    clean = problem(2, tokens, 4, 2, 40, 600, cache_dtype=cache_dtype)
    position = 600 - tokens // 2 - 1  # later rows see it, earlier ones do not
    for name, bad in itertools.product(("key", "value"), (torch.nan, torch.inf, -torch.inf)):
        arguments = {n: t.clone() if isinstance(t, Tensor) else t for n, t in clean.items()}
        target = arguments[f"{name}_scales"][..., None] if cache_dtype == torch.int8 else arguments[name]
        target[0, 1, position] = bad
        y, before = OPS.attention(**arguments), OPS.attention(**clean)
        touched = torch.zeros(2, tokens, 4, dtype=torch.bool)
        touched[0, position - (600 - tokens) :, 2:] = True
        torch.testing.assert_close(y[~touched], before[~touched], rtol=1e-5, atol=1e-6)
        if bad != bad:
            assert y[touched].isnan().all()
        if name == "value":
            assert not y[touched].isfinite().any()
        mask = torch.ones(1, 1, 1, 600, dtype=torch.bool)
        mask[..., position] = False
        hidden = OPS.attention(**{**arguments, "mask": mask})
        torch.testing.assert_close(hidden, OPS.attention(**{**clean, "mask": mask}), rtol=1e-5, atol=1e-6)
    query = clean["query"].clone()
    query[0, 0, 1, 3] = torch.nan
    y = OPS.attention(**{**clean, "query": query})
    assert y[0, 0, 1].isnan().all()
    assert y.isnan().sum() == 40


def test_threads_do_not_change_a_bit(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for arguments in (problem(2, 2, 8, 2, 64, 1500), problem(1, 300, 4, 2, 32, 300)):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(OPS.attention(**arguments))
            assert all(torch.equal(results[0], y) for y in results[1:])
    finally:
        torch.set_num_threads(before)


def test_a_batch_gives_the_bits_of_each_sequence(isa: str) -> None:
    arguments = problem(3, 2, 4, 2, 64, 700)
    y = OPS.attention(**arguments)
    for b in range(3):
        alone = {**arguments, **{n: arguments[n][b : b + 1] for n in ("query", "key", "value")}}
        assert torch.equal(OPS.attention(**alone), y[b : b + 1])


def test_windows_that_reach_all_keys_are_none(isa: str) -> None:
    for keys, tokens in ((129, 1), (5, 9), (7, 40)):  # some queries stand before the first key
        a = {**problem(tokens=tokens, keys=keys), "causal": False}
        want = OPS.attention(**a)
        for window in (keys, 2**63 - 1, 2**63 - 8):
            assert torch.equal(OPS.attention(**a, window=window), want)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_opcheck(cache_dtype: torch.dtype) -> None:
    for tokens in (1, 20):
        arguments = problem(2, tokens, 4, 2, 20, 33, value_dim=24, dtype=torch.bfloat16, cache_dtype=cache_dtype)
        torch.library.opcheck(OPS.attention.default, (), {**arguments, "length": torch.tensor([30])})


def test_attention_refuses_gradients() -> None:
    arguments = problem()
    query = arguments["query"].requires_grad_()
    with pytest.raises(Int4Error, match="attention is for inference"):
        OPS.attention(**arguments).sum().backward()
    assert query.grad is None


def test_compile_without_graph_breaks() -> None:
    def step(a: dict[str, Any], b: dict[str, Any]) -> Tensor:
        query = OPS.rotary_append(**a)
        return OPS.attention(query, a["key_cache"], a["value_cache"], None, None, a["length"], None, None, **b)

    options = {"scale": 0.125, "causal": True}
    eager, traced = append_problem(), append_problem()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(compiled(traced, options), step(eager, options))
    assert int(traced["length"]) == 14


def test_bad_arguments_of_attention_are_named() -> None:
    a = problem(2, 3, 4, 2, 32, 40)
    op = OPS.attention
    refuses(op, a, "query must have 4 dimensions", query=torch.zeros(2, 3, 4))
    refuses(op, a, "query must be float32", query=torch.zeros(2, 3, 4, 32, dtype=torch.int32))
    refuses(op, a, "last dimension of query", query=torch.zeros(2, 3, 32, 4).transpose(2, 3))
    refuses(op, a, "key must be float32", key=torch.zeros(2, 2, 40, 32, dtype=torch.int32))
    refuses(op, a, "value and key must have one dtype", value=torch.zeros(2, 2, 40, 32, dtype=torch.half))
    refuses(op, a, "head size of query", key=torch.zeros(2, 2, 40, 31))
    refuses(op, a, "batch of query", key=torch.zeros(1, 2, 40, 32))
    refuses(op, a, "value has shape", value=torch.zeros(2, 2, 41, 32))
    refuses(op, a, "not a multiple of the 3 heads", key=torch.zeros(2, 3, 40, 32), value=torch.zeros(2, 3, 40, 32))
    refuses(op, a, "key_scales must be None", key_scales=torch.zeros(2, 2, 40))
    codes = {n: torch.zeros(2, 2, 40, 32, dtype=torch.int8) for n in ("key", "value")}
    refuses(op, a, "key_scales must be given", **codes)
    scales = {n: torch.zeros(2, 2, 40) for n in ("key_scales", "value_scales")}
    refuses(op, {**a, **codes, **scales}, "key_scales has shape", key_scales=torch.zeros(2, 2, 39))
    refuses(op, {**a, **codes, **scales}, "key_scales must be float32", key_scales=torch.zeros(2, 2, 40).half())
    refuses(op, a, "length is 41 but key holds 40", length=torch.tensor([41]))
    refuses(op, a, "length is -1", length=torch.tensor([-1]))
    refuses(op, a, "length must be int64", length=torch.tensor([4], dtype=torch.int32))
    refuses(op, a, "mask must have 4 dimensions", mask=torch.ones(3, 40, dtype=torch.bool))
    refuses(op, a, "columns, one per key", mask=torch.ones(2, 1, 3, 39, dtype=torch.bool))
    refuses(op, a, "number of query tokens", mask=torch.ones(2, 1, 2, 40, dtype=torch.bool))
    refuses(op, a, "number of heads", mask=torch.ones(2, 2, 3, 40, dtype=torch.bool))
    refuses(op, a, "mask must be bool", mask=torch.ones(2, 1, 3, 40, dtype=torch.int64))
    refuses(op, a, "alibi_slopes has shape", alibi_slopes=torch.zeros(5))
    refuses(op, a, "alibi_slopes must be float32", alibi_slopes=torch.zeros(4, dtype=torch.half))
    refuses(op, a, "window must not be negative", window=-1)
    refuses(op, a, "softcap must not be negative", softcap=-1.0)
    refuses(op, a, "sinks has shape", sinks=torch.zeros(5))
    refuses(op, a, "sinks must be float32, bfloat16 or float16", sinks=torch.zeros(4, dtype=torch.int32))
