"""Our caches seen by others: what a `DynamicCache` shows, and what a model that was pickled needs."""

import copy

import pytest
import torch
from alone import run_alone
from decoders import assert_near, decoder, pair, prompt
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache

from torch_int4 import Int4Cache, Int4Error, patch
from torch_int4.nn.attention_interface import NAME


@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2), ("int8", 2e-2), ("auto", 1e-2)])
@torch.no_grad()
def test_layers_show_the_tokens_in_the_dtype_of_the_activations(kind, tolerance):
    patched, reference = pair("llama", kv_cache=kind)
    ours = patched(prompt(), use_cache=True).past_key_values
    stock = DynamicCache(config=reference.config)
    reference(prompt(), past_key_values=stock)
    assert type(ours) is Int4Cache
    assert len(list(ours)) == len(list(stock)) == 2
    for got, want in zip(ours, stock, strict=True):
        assert len(got) == len(want) == 3
        assert got[2] is want[2] is None
        for a, b in zip(got[:2], want[:2], strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert_near(a, b, tolerance)


def test_an_empty_cache_shows_nothing():
    cache = Int4Cache(decoder("llama").config)
    assert [layer.keys for layer in cache.layers] == [None, None]
    assert (cache.max_cache_len, Int4Cache(decoder("llama").config, max_length=7).max_cache_len) == (-1, 7)


@torch.no_grad()
def test_what_is_shown_can_be_written_but_not_replaced():
    patched, _ = pair("llama")
    cache = patched(prompt(), use_cache=True).past_key_values
    layer = cache.layers[0]
    other = torch.randn(layer.keys.shape)
    layer.keys = other
    assert torch.equal(layer.keys, other)
    for value in (other[:, :, :3], None):
        with pytest.raises(Int4Error, match="keys of an Int4Cache cannot be replaced"):
            layer.keys = value
    assert torch.equal(layer.keys, other)


@pytest.mark.parametrize("attention", ["fused", "stock"])
def test_prefix_tuning_generates(attention):
    patched, reference = pair("llama", attention=attention)
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    models = [get_peft_model(model, copy.deepcopy(config)).eval() for model in (patched, reference)]
    models[0].load_state_dict(models[1].state_dict(), strict=False)
    ids = prompt()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    got, want = (model.generate(input_ids=ids, **options) for model in models)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["jais2", "llama"])
def test_a_pickled_model_runs_in_another_process(name, tmp_path):
    """Nothing of ours is imported there before the model is, but torch_int4 itself."""
    model = patch(decoder(name))
    assert (model.config._attn_implementation == NAME) is (name == "jais2")
    with torch.no_grad():
        want = model(prompt()).logits
    torch.save({"model": model, "ids": prompt(), "want": want}, tmp_path / "model.pt")
    code = f"""
import torch
saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    assert torch.equal(saved["model"](saved["ids"]).logits, saved["want"])
"""
    result = run_alone(code)
    assert result.returncode == 0, result.stderr[-2000:]
