"""Biases of attention scores, and settings and arguments of the families whose modules have them, or add residuals."""

import copy
import gc

import pytest
import torch
from decoders import Calls, assert_near, decoder, pair, prompt
from fused_layers import CLOSE, fused_layers
from tiny_models import dequantized
from torch import nn
from transformers import AutoModelForCausalLM

from torch_int4 import patch
from torch_int4.nn import attend as bias_module
from torch_int4.nn.attend import biased, is_bias

pytestmark = pytest.mark.oldest


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_bias_of_every_row_is_added_to_the_mask():
    mask, bias = random(2, 1, 5, 7), random(6, 1, 7, seed=1)
    got = biased(mask, bias, 3, hides=False)
    assert got.shape == (2, 3, 5, 7)
    for row in range(2):
        for head in range(3):
            assert torch.equal(got[row, head], mask[row, 0] + bias[3 * row + head])
    hidden = mask > 0
    seen = biased(~hidden, bias, 3, hides=False)
    assert torch.equal(seen, biased(hidden, bias, 3, hides=True))


def test_of_a_bias_for_more_keys_the_last_ones_count():
    hidden, bias = random(2, 1, 5, 7) > 0, random(3, 1, 20, seed=1)
    got = biased(hidden, bias, 3, hides=True)
    want = bias[None, :, :, 13:].expand(2, 3, 5, 7).clone()
    want[hidden.expand(2, 3, 5, 7)] = torch.finfo(torch.float32).min
    assert torch.equal(got, want)


def test_layers_share_a_sum_until_something_is_written():
    mask, bias = random(1, 1, 4, 4), random(2, 1, 4)
    first = biased(mask, bias, 2, hides=False)
    assert biased(mask, bias, 2, hides=False) is first
    assert biased(mask, bias.clone(), 2, hides=False) is not first
    mask += 1
    assert torch.equal(biased(mask, bias, 2, hides=False), mask + bias[None])
    count = len(bias_module._made)
    del mask, first
    gc.collect()
    assert len(bias_module._made) == count - 1


@pytest.mark.parametrize(
    ("bias", "mask", "hides"),
    [
        (None, random(2, 1, 4, 4), False),
        (random(3, 1, 4), None, False),
        (random(3, 4), random(2, 1, 4, 4), False),
        (random(3, 2, 4), random(2, 1, 4, 4), False),
        (random(4, 1, 4), random(2, 1, 4, 4), False),  # of as many heads as there are not
        (random(3, 1, 3), random(2, 1, 4, 4), False),  # of fewer keys
        (torch.ones(3, 1, 4, dtype=torch.int64), random(2, 1, 4, 4), False),
        (random(3, 1, 4), random(2, 1, 4, 4), True),
    ],
)
def test_other_biases_are_left_to_the_stock_module(bias, mask, hides):
    assert not is_bias(bias, mask, 3, hides)
    assert is_bias(random(3, 1, 4), random(2, 1, 4, 4), 3, False)


@pytest.mark.parametrize(
    ("name", "fields", "fused", "reason"),
    [
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, 0, "has clip_qkv = 6.0"),
        (
            "bloom",
            {"apply_residual_connection_post_layernorm": True},
            2,
            "has apply_residual_connection_post_layernorm",
        ),
        ("opt", {"do_layer_norm_before": False}, 2, "has do_layer_norm_before = False"),
        ("olmo", {"clip_qkv": 0.5}, 0, "has config.clip_qkv = 0.5"),
    ],
)
def test_settings_that_stay_stock_are_said(name, fields, fused, reason):
    config = decoder(name).config
    for key, value in fields.items():
        setattr(config, key, type(config.attn_config)(**value) if isinstance(value, dict) else value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match="not fused"):
        patched = patch(copy.deepcopy(model), compute="fp32", kv_cache="fp32")
    report = patched.torch_int4_report
    assert (report.blocks, report.fused) == (0, fused)
    assert any(reason in line for line in report.unfused)
    with torch.no_grad():
        assert_near(patched(prompt()).logits, dequantized(model, patched)(prompt()).logits, CLOSE)


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_fused_attention_in_stock_layers_adds_what_the_stock_one_does(name):
    patched, reference = pair(name)
    block = next(module for module in patched.modules() if "fused by" in module.extra_repr())
    mlp = block.mlp if name == "bloom" else block.ffn
    mlp.register_forward_hook(lambda *_: None)  # which makes the layer run stock
    with torch.no_grad(), Calls() as calls:
        got, layers = patched(prompt()).logits, calls.attended
        assert_near(got, reference(prompt()).logits, CLOSE)
    assert layers == 2


def test_arguments_by_their_place_are_those_of_the_names():
    patched, _ = pair("gpt2")
    layer, x = patched.transformer.h[0], random(1, 4, 64)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    got, layers = fused_layers(lambda: layer(x, None, mask))
    assert layers == 1
    want, layers = fused_layers(lambda: layer(x, attention_mask=mask))
    assert layers == 1
    assert torch.equal(got, want)
    with pytest.raises(TypeError, match="attention_mask"), torch.no_grad():
        layer(x, None, mask, attention_mask=mask)


def test_states_of_an_encoder_are_left_to_the_stock_layer():
    patched, _ = pair("gpt2")
    layer, x = patched.transformer.h[0], random(1, 4, 64)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with torch.no_grad(), pytest.raises(ValueError, match="add_cross_attention"):
        layer(x, attention_mask=mask, encoder_hidden_states=x)


def test_an_activation_of_a_known_name_that_computes_something_else_is_refused():
    model = decoder("bloom")

    def forward(self, x):
        return 2 * torch.tanh(x)

    other = type("BloomGelu", (nn.Module,), {"forward": forward})
    model.transformer.h[0].mlp.gelu_impl = other()
    with pytest.warns(UserWarning, match="not fused"):
        report = patch(model).torch_int4_report
    assert report.blocks == 1
    assert any("its activation BloomGelu is not the gelu_tanh" in line for line in report.unfused)
