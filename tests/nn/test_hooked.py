"""Layers that run as stock modules because of hooks say so once, with the hook and what to do."""

import warnings

import pytest
import torch
from decoders import decoder
from tiny_models import IDS, logits

from torch_int4 import patch
from torch_int4.nn import told as told_of


@pytest.fixture(autouse=True)
def _anew(monkeypatch):
    monkeypatch.setattr(told_of, "_told", set())


def told(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if "runs as a stock module" in str(each.message)]


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "olmoe"])
def test_router_logits_leave_hooks_of_transformers(name):
    model = patch(decoder(name), compute="fp32", kv_cache="fp32")
    want = logits(model)
    assert not told(lambda: logits(model))
    with torch.no_grad():
        (line,) = told(lambda: model(input_ids=IDS, output_router_logits=True))
    assert "output_capturing" in line
    assert "router logits" in line
    assert "loaded anew" in line
    assert not told(lambda: logits(model))  # once is enough
    torch.testing.assert_close(logits(model), want, atol=1e-3, rtol=1e-3)


def test_a_hook_of_the_user_is_named_until_it_is_gone():
    model = patch(decoder("llama"))
    want = logits(model)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, x, y: None)
    (line,) = told(lambda: logits(model))
    assert "because mlp in it has a hook" in line
    assert "once the hook is removed" in line
    handle.remove()
    assert not told(lambda: logits(model))
    assert torch.equal(logits(model), want)


def test_training_says_nothing():
    model = patch(decoder("llama"))
    model.model.layers[0].mlp.register_forward_hook(lambda module, x, y: None)
    model.requires_grad_(False)
    model.train()
    assert not told(lambda: logits(model))
