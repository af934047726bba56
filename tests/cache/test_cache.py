import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import torch_int4
from torch_int4 import Int4Cache, Int4Error
from torch_int4.cache.int4_cache import Int4CacheLayer
from torch_int4.cache.storage import BLOCK

EXACT = {"dtype": "fp32"}


def states(tokens, batch=2, heads=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, size, generator=generator) for _ in range(2)]


def filled(tokens=5, **options):
    """A layer of ours and one of transformers with the same content."""
    ours, stock = Int4CacheLayer(**{**EXACT, **options}), DynamicCache()
    ours.update(*states(tokens))
    stock.update(*states(tokens), 0)
    return ours, stock.layers[0]


def assert_same(ours, stock):
    assert int(ours.get_seq_length()) == stock.get_seq_length() == int(ours.length)
    n = stock.get_seq_length()
    torch.testing.assert_close(ours.keys[:, :, :n], stock.keys)
    torch.testing.assert_close(ours.values[:, :, :n], stock.values)


def fixed_or_growing(test):
    return pytest.mark.parametrize("options", [{}, {"max_length": 40}], ids=["growing", "fixed"])(test)


# What transformers expects of a layer


@torch.no_grad()
@fixed_or_growing
def test_it_holds_what_transformers_holds(options):
    ours, stock = filled(**options)
    for tokens in (1, 1, 7, 1):
        got, want = ours.update(*states(tokens, seed=tokens)), stock.update(*states(tokens, seed=tokens))
        for a, b in zip(got, want, strict=True):
            assert a.shape[2] == (40 if options else b.shape[2])
            torch.testing.assert_close(a[:, :, : b.shape[2]], b)
    assert_same(ours, stock)
    assert ours.get_max_length() == options.get("max_length", -1)
    assert ours.get_mask_sizes(3) == ((40, 0) if options else stock.get_mask_sizes(3))
    assert ours.is_compileable == bool(options)


@torch.no_grad()
@fixed_or_growing
def test_rows_are_reordered_repeated_and_selected(options):
    ours, stock = filled(**options)
    for call, argument in (
        ("batch_repeat_interleave", 2),
        ("reorder_cache", torch.tensor([3, 1, 0, 0])),
        ("reorder_cache", torch.tensor([0, 1, 2, 3])),
        ("reorder_cache", torch.tensor([1, 2, 3, 0])),
        ("batch_select_indices", torch.tensor([2, 0, 0])),
        ("batch_select_indices", torch.tensor([True, False, True])),
    ):
        getattr(ours, call)(argument)
        getattr(stock, call)(argument)
        assert_same(ours, stock)
    assert ours.batch_size == 2
    ours.update(*states(2, seed=5))
    stock.update(*states(2, seed=5))
    assert_same(ours, stock)


@torch.no_grad()
@fixed_or_growing
def test_it_can_be_cut_and_emptied(options):
    ours, stock = filled(9, **options)
    for layer in (ours, stock):
        layer.crop(-4)
        layer.crop(0)
        layer.update(*states(3, seed=1))
    assert_same(ours, stock)
    with pytest.raises(Int4Error, match="negative"):
        ours.crop(3)
    storage = ours.stored_keys
    ours.reset()
    assert int(ours.get_seq_length()) == 0
    assert ours.stored_keys is storage
    if options:
        assert not ours.stored_keys.any()  # stock modules read all of it
    ours.crop(-4)
    assert int(ours.get_seq_length()) == int(ours.length) == 0
    ours.update(*states(2, seed=2))
    torch.testing.assert_close(ours.keys[:, :, :2], states(2, seed=2)[0])


def test_an_unused_layer_takes_every_call():
    layer = Int4CacheLayer()
    assert layer.get_seq_length() == layer.capacity == 0
    assert layer.get_mask_sizes(4) == (4, 0)
    layer.crop(-2)
    layer.reset()
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    assert not layer.is_initialized


# Memory


@torch.no_grad()
def test_it_is_written_in_place_and_grows_seldom():
    layer = Int4CacheLayer(**EXACT)
    addresses = set()
    for step in range(3 * BLOCK):
        layer.update(*states(1, seed=step))
        assert layer.capacity % BLOCK == 0
        addresses.add((layer.stored_keys.data_ptr(), layer.capacity))
    assert len({capacity for _, capacity in addresses}) == len(addresses) <= 4
    torch.testing.assert_close(layer.keys[:, :, 700:701], states(1, seed=700)[0])
    layer.update(*states(5 * BLOCK))
    assert 8 * BLOCK <= layer.capacity <= 12 * BLOCK


@torch.no_grad()
def test_what_update_returns_is_not_a_copy():
    layer = Int4CacheLayer()  # "auto" keeps the dtype of who reads everything back
    keys, values = layer.update(*states(4))
    assert keys.data_ptr() == layer.keys.data_ptr()
    assert values.data_ptr() == layer.values.data_ptr()


@torch.no_grad()
def test_a_full_cache_of_fixed_size_says_so_and_keeps_its_content():
    layer = Int4CacheLayer(max_length=6, **EXACT)
    layer.update(*states(5))
    with pytest.raises(RuntimeError, match="6"):
        layer.update(*states(2, seed=1))
    assert int(layer.length) == 5
    torch.testing.assert_close(layer.keys[:, :, :5], states(5)[0])


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bytes_each"), [("fp32", 4), ("bf16", 2), ("fp16", 2), ("int8", 1 + 4 / 8)])
def test_bytes_and_precision(dtype, bytes_each):
    cache = Int4Cache(dtype=dtype)
    keys, values = states(100)
    got = cache.update(keys, values, 0)
    assert cache.nbytes == 2 * 2 * 3 * BLOCK * 8 * bytes_each
    assert got[0].dtype == torch.float32
    bound = {"fp32": 0, "bf16": 2**-8, "fp16": 2**-11, "int8": 0}[dtype]
    step = {"int8": 1 / 254}.get(dtype, 0)
    for a, b in zip(got, (keys, values), strict=True):
        slack = bound * b.abs() + step * b.abs().amax(-1, keepdim=True) + 1e-7
        assert ((a - b).abs() <= slack).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_extremes(dtype):
    keys, values = states(4)
    keys[0, 0, 0] = 1e30
    keys[0, 0, 1] = 0
    keys[0, 0, 2, 3] = float("nan")
    values[1, 2, 3] = 1e-30
    got, _ = Int4CacheLayer(dtype).update(keys, values)
    assert torch.isfinite(got[0, 0, 0]).all()
    assert (got[0, 0, 0] > 6e4).all()
    assert (got[0, 0, 1] == 0).all()
    assert got[0, 0, 2].isnan().any()
    rest = torch.ones(2, 3, 4, dtype=torch.bool)
    rest[0, 0, 2] = False
    assert torch.isfinite(got[rest]).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("activations", "stored"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_auto_is_16_bits_for_fused_attention(activations, stored):
    layer = Int4CacheLayer()
    key = torch.ones(1, 2, 3, 8, dtype=getattr(torch, activations))
    assert layer.append(key, key, key).dtype == key.dtype
    assert layer.stored_keys.dtype == getattr(torch, stored)
    assert layer.keys.dtype == key.dtype


# Gradients, copies, arguments


@fixed_or_growing
def test_gradients_flow_through_new_tokens_and_writes_do_not_harm_them(options):
    layer = Int4CacheLayer(**EXACT, **options)
    with torch.no_grad():
        layer.update(*states(3))
    inputs = [x.requires_grad_() for x in states(2, seed=1)]
    keys, values = layer.update(*inputs)
    loss = (keys[:, :, :5] * values[:, :, :5]).square().sum()
    layer.update(*states(1, seed=2))
    loss.backward()
    wanted = [x.detach().requires_grad_() for x in inputs]
    keys, values = (torch.cat(pair, 2) for pair in zip(states(3), wanted, strict=True))
    (keys * values).square().sum().backward()
    for got, want in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(got.grad, want.grad)


@torch.no_grad()
def test_callers_that_repeat_key_heads_get_them_back():
    layer = Int4CacheLayer(**EXACT)
    key = torch.randn(2, 4, 3, 8)
    layer.append(key, key, key)  # 3 heads
    keys, values = (x.repeat_interleave(4, dim=1) for x in states(2))
    got, _ = layer.update(keys, values)
    assert got.shape == (2, 12, 6, 8)
    torch.testing.assert_close(got[:, :, 4:], keys)
    assert layer.stored_keys.shape[1] == 3


@torch.no_grad()
@fixed_or_growing
def test_copies_and_pickles_are_independent(options):
    cache = Int4Cache(LlamaConfig(num_hidden_layers=3), **EXACT, **options)
    assert len(cache) == 3
    for layer in range(3):
        cache.update(*states(4, seed=layer), layer)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        other.update(*states(1, seed=9), 2)
        assert int(other.get_seq_length(2)) == 5
        assert int(cache.get_seq_length(2)) == 4
        torch.testing.assert_close(other.layers[2].keys[:, :, :4], states(4, seed=2)[0])


def test_early_initialization_allocates_all_layers():
    cache = Int4Cache(LlamaConfig(num_hidden_layers=2), max_length=32)
    cache.early_initialization(2, 3, 8, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert [layer.keys.shape for layer in cache.layers] == [(2, 3, 32, 8)] * 2


def test_wrong_arguments():
    with pytest.raises(Int4Error, match=r"'auto', 'fp32', 'bf16', 'fp16', 'int8'; got 'int4'"):
        Int4Cache(dtype="int4")
    with pytest.raises(Int4Error, match="at least 1"):
        Int4Cache(max_length=0)
    assert torch_int4.Int4Cache is Int4Cache
    with pytest.raises(AttributeError, match="no_such"):
        _ = torch_int4.no_such
