"""Patched decoders give what float models with stock attention and the same weights give, whatever the cache."""

import copy
import pickle

import pytest
import torch
from decoders import ALL, FUSED, GENERIC, MAIN, Calls, assert_near, decoder, pair, prompt
from generating import CLOSE, steps
from transformers import DynamicCache, StaticCache

from torch_int4 import Int4Cache, patch
from torch_int4.nn.attention import FusedAttention

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("name", ALL)
def test_prefill_and_64_steps(name):
    patched, reference = pair(name)
    ids = prompt(tokens=12 + 64)
    with Calls() as calls:
        got, cache = steps(patched, ids, 12)
    want, _ = steps(reference, ids, 12)
    assert_near(got, want, CLOSE)
    assert type(cache) is Int4Cache
    assert cache.get_seq_length() == 76
    assert calls.attended == 2 * 65
    with torch.no_grad():
        assert_near(patched(ids, use_cache=False).logits, reference(ids, use_cache=False).logits, CLOSE)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(name, side):
    patched, reference = pair(name)
    ids, mask = prompt(rows=3, tokens=20), torch.ones(3, 20, dtype=torch.int64)
    if side == "left":
        mask[0, :5] = mask[1, :9] = 0
        got, _ = steps(patched, ids, 14, mask=mask)
        want, _ = steps(reference, ids, 14, mask=mask)
    else:
        mask[0, 15:] = mask[1, 11:] = 0
        with torch.no_grad():
            got, want = patched(ids, attention_mask=mask).logits, reference(ids, attention_mask=mask).logits
    assert_near(got[mask.bool()], want[mask.bool()], CLOSE)


@pytest.mark.parametrize("name", MAIN)
def test_arbitrary_masks(name):
    """Any 4D mask that a user gives, also one that is not causal."""
    if name == "falcon-rw":
        pytest.skip("adds its own bias to the mask, and takes no other")
    patched, reference = pair(name)
    ids = prompt()
    keep = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    keep |= torch.eye(12, dtype=torch.bool)
    added = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(2)).masked_fill(~keep, -torch.inf)
    for mask in (added,) if name == "gptj" else (keep, added):  # plain attention adds any mask, also a bool one
        with torch.no_grad():
            got = patched(ids, attention_mask=mask).logits
            assert_near(got, reference(ids, attention_mask=mask).logits, CLOSE)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
    ],
    ids=["greedy", "beams", "sampling", "lookup", "chunks"],
)
def test_generate(name, options):
    patched, reference = pair(name)
    if patched._is_stateful and "prompt_lookup_num_tokens" in options:
        pytest.skip("transformers takes no guesses from such models")
    lookup = "prompt_lookup_num_tokens" in options
    ids = prompt(rows=1 if lookup else 2).repeat(1, 2 if lookup else 1)
    sequences = []
    for model in (patched, reference):
        torch.manual_seed(0)
        with Calls() as calls:
            sequences.append(model.generate(ids, **{"max_new_tokens": 16, "do_sample": False, **options}))
        assert (calls.attended > 0) == (model is patched)
    assert torch.equal(*sequences)


@pytest.mark.parametrize("name", MAIN)
def test_assisted_generation_and_chat_turns(name):
    patched, reference = pair(name)
    assistant = patch(decoder(name), compute="fp32")
    ids = prompt(rows=1)
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    want = reference.generate(ids, **options)
    got = patched.generate(ids, assistant_model=assistant, **options)
    assert torch.equal(got.sequences, want.sequences)
    caches = got.past_key_values, want.past_key_values
    assert type(caches[0]) is Int4Cache
    turn = torch.cat([want.sequences, prompt(rows=1, tokens=4, seed=3)], dim=1)
    sequences = [
        model.generate(turn, past_key_values=cache, max_new_tokens=8, do_sample=False)
        for model, cache in zip((patched, reference), caches, strict=True)
    ]
    assert torch.equal(*sequences)


@pytest.mark.parametrize("name", ALL)
def test_a_cache_that_is_cut_and_continued(name):
    patched, reference = pair(name)
    if patched._is_stateful:
        pytest.skip("transformers cannot cut the states of such models")
    ids = prompt(tokens=24)
    _, cache = steps(patched, ids[:, :18], 14)
    cache.crop(-8)
    assert cache.get_seq_length() == 10
    with torch.no_grad():
        more = patched(ids[:, 10:], past_key_values=cache).logits  # several tokens after others
        want = reference(ids).logits
    assert_near(more, want[:, 10:], CLOSE)


@pytest.mark.parametrize("name", [*MAIN, "mistral", "gemma2", *GENERIC])
@pytest.mark.parametrize("kind", ["dynamic", "sliding", "static", "fixed"])
def test_other_caches(name, kind):
    if name == "falcon-rw" and kind in ("static", "fixed"):
        pytest.skip("its bias has no columns for places that are empty, in transformers too")
    patched, reference = pair(name)
    ids = prompt(tokens=30)
    cache = {
        "dynamic": lambda: DynamicCache(),
        "sliding": lambda: DynamicCache(config=patched.config),
        "static": lambda: StaticCache(config=patched.config, max_cache_len=40),
        "fixed": lambda: Int4Cache(patched.config, dtype="fp32", max_length=40),
    }[kind]()
    with Calls() as calls:
        got, after = steps(patched, ids, 12, cache=cache)
    want, _ = steps(reference, ids, 12)
    assert_near(got, want, CLOSE)
    assert after is cache
    assert calls.attended == 2 * 19


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize(("kv_cache", "bound"), [("bf16", 2e-2), ("auto", 2e-2), ("fp16", 4e-3), ("int8", 4e-2)])
def test_smaller_caches(name, kv_cache, bound):
    patched, reference = pair(name, kv_cache=kv_cache)
    ids = prompt(tokens=40)
    got, cache = steps(patched, ids, 20)
    want, _ = steps(reference, ids, 20)
    assert_near(got, want, bound)
    assert (got - want).norm() > 1e-5 * want.norm()  # or the cache is not in that dtype
    stored = {"int8": torch.int8, "fp16": torch.float16}.get(kv_cache, torch.bfloat16)
    assert all(layer.stored_keys.dtype == layer.stored_values.dtype == stored for layer in cache.layers)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(name, dtype):
    model = decoder(name, dtype)
    exact = decoder(name).to(dtype).float()  # the same weights
    options = {"compute": "fp32", "head": "float"}
    patched = patch(model, **options)
    stock = patch(copy.deepcopy(exact), attention="stock", **options)
    ids = prompt(tokens=24)
    got, cache = steps(patched, ids, 16)
    want, _ = steps(stock, ids, 16)
    assert got.dtype == cache.layers[0].stored_keys.dtype == dtype
    assert_near(got.float(), want, 6e-2 if dtype == torch.bfloat16 else 8e-3)


# The module that it still is


@pytest.mark.parametrize("name", FUSED)
def test_classes_keys_and_hooks_stay(name):
    model = decoder(name)
    stock = {path: type(module) for path, module in model.named_modules()}
    patched = patch(copy.deepcopy(model), attention="fused")
    keys = patch(copy.deepcopy(model), attention="stock").state_dict().keys()
    assert patched.state_dict().keys() == keys
    fused = [m for m in patched.modules() if isinstance(m, FusedAttention)]
    assert all("fused by torch_int4" in m.extra_repr() for m in fused)
    assert len(fused) == patched.torch_int4_report.fused == 2
    for path, module in patched.named_modules():
        if path in stock and "Attention" in stock[path].__name__:  # experts have become linears
            assert isinstance(module, stock[path])
            assert type(module).__name__ == stock[path].__name__
    seen = []
    fused[0].register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    with torch.no_grad():
        patched(prompt())
    assert seen == [(2, 12, 64 if name != "llama-odd" else 72)]


@pytest.mark.parametrize("name", [*MAIN, "gpt2"])
def test_copies_and_pickles_work(name, tmp_path):
    patched, _ = pair(name)
    ids = prompt()
    want = patched.generate(ids, max_new_tokens=6, do_sample=False)
    torch.save(patched, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(patched),
        pickle.loads(pickle.dumps(patched)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert type(other) is type(patched)
        with Calls() as calls:
            assert torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), want)
        assert calls.attended > 0


def test_the_cache_of_a_generate_call_stores_what_the_config_says():
    patched, _ = pair("llama", kv_cache="int8")
    out = patched.generate(prompt(), max_new_tokens=2, return_dict_in_generate=True)
    assert out.past_key_values.layers[1].stored_values.dtype == torch.int8
    assert patched(prompt(), use_cache=False).past_key_values is None
    given = DynamicCache(config=patched.config)
    with torch.no_grad():
        assert patched(prompt(), past_key_values=given).past_key_values is given
    assert given.get_seq_length() == 12
    out = patched.generate(prompt(), max_new_tokens=2, return_dict_in_generate=True, cache_implementation="static")
    assert type(out.past_key_values) is StaticCache


def test_inference_mode_and_other_modes_share_a_cache():
    patched, reference = pair("llama")
    ids = prompt(tokens=16)
    with torch.inference_mode():
        cache = patched(ids[:, :8]).past_key_values
    with torch.no_grad():
        got = patched(ids[:, 8:], past_key_values=cache).logits
        assert_near(got, reference(ids).logits[:, 8:], CLOSE)
