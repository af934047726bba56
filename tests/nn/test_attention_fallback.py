"""Calls that the attention operators do not serve run in the stock modules: gradients, training, recorded weights."""

import pytest
import torch
from decoders import GENERIC, MAIN, Calls, assert_near, pair, prompt
from generating import CLOSE, steps
from transformers import DynamicCache

from torch_int4 import Int4Cache

pytestmark = pytest.mark.oldest


def without_operators(action):
    with Calls() as calls:
        result = action()
    assert calls.attended == 0
    return result


@pytest.mark.parametrize("name", [*MAIN, "gemma2", *GENERIC])
def test_gradients_are_those_of_stock_attention(name):
    patched, _ = pair(name)
    stock, _ = pair(name, attention="stock")
    ids = prompt()
    gradients = []
    for model in (patched, stock):
        without_operators(lambda model=model: model(ids, labels=ids).loss.backward())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for key, got in gradients[0].items():
        torch.testing.assert_close(got, gradients[1][key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", MAIN)
def test_training_and_checkpointing_are_left_to_the_stock_module(name):
    patched, _ = pair(name)
    stock, _ = pair(name, attention="stock")
    ids = prompt()
    for model in (patched, stock):
        model.train()
        model.gradient_checkpointing_enable()
    losses = [without_operators(lambda m=model: m(ids, labels=ids).loss) for model in (patched, stock)]
    torch.testing.assert_close(*losses)
    for model, loss in zip((patched, stock), losses, strict=True):
        loss.backward()
        model.eval()
    with torch.no_grad(), Calls() as calls:
        patched(ids)
    assert calls.attended == 2


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon", "gptj"])
def test_attention_weights_can_be_recorded(name):
    patched, reference = pair(name)
    ids = prompt()
    reference.config._attn_implementation_internal = "eager"  # Falcon's other one does not hide the future then
    if patched._can_set_attn_implementation():
        patched.set_attn_implementation("eager")
    with torch.no_grad():
        got = without_operators(lambda: patched(ids, output_attentions=True).attentions)
        want = reference(ids, output_attentions=True).attentions
    assert len(got) == 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [*MAIN, "mistral", *GENERIC])
@pytest.mark.parametrize("kind", ["ours", "dynamic"])
def test_both_paths_take_turns_on_one_cache(name, kind):
    patched, reference = pair(name)
    ids = prompt(tokens=20)
    cache = DynamicCache(config=patched.config) if kind == "dynamic" else Int4Cache(patched.config, dtype="fp32")
    pieces = []
    for start, end, fused in ((0, 6, True), (6, 11, False), (11, 12, False), (12, 17, True), (17, 20, False)):
        with torch.set_grad_enabled(not fused):
            pieces.append(patched(ids[:, start:end], past_key_values=cache).logits.detach())
    with torch.no_grad():
        assert_near(torch.cat(pieces, dim=1), reference(ids).logits, CLOSE)


def test_attention_is_left_alone_when_asked():
    patched, reference = pair("llama", attention="stock")
    assert type(patched.model.layers[0].self_attn) is type(reference.model.layers[0].self_attn)
    _, cache = without_operators(lambda: steps(patched, prompt(), 6))
    assert type(cache) is DynamicCache
    assert "attention:" not in str(patched.torch_int4_report)
