"""Layers of a known family that are not fused stay stock; the report and a warning give the reason."""

import copy
import dataclasses
import warnings

import pytest
import torch
import transformers
from decoders import ALL, Calls, assert_near, decoder, prompt
from tiny_models import dequantized
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from torch_int4 import patch
from torch_int4.patching import families
from torch_int4.support.forwards import fingerprint

pytestmark = pytest.mark.oldest

WITH = f"(transformers {transformers.__version__})"


def refused(model, says, fused=0, blocks=0, **options):
    """Patches a model of which something cannot be fused, and looks for the reason and for right answers."""
    stock = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="not fused, and so slower") as caught:
        patched = patch(model, compute="fp32", kv_cache="fp32", **options)
    report = patched.torch_int4_report
    assert (report.fused, report.blocks) == (fused, blocks)
    assert says in report.unfused
    assert f"not fused: {says}" in str(report)
    assert says in str(caught[0].message)
    assert len(caught) == 1
    with torch.no_grad():
        assert_near(patched(prompt()).logits, dequantized(stock, patched)(prompt()).logits, 2e-3)
    return patched


def subclass(module, **fields):
    """Make a module one of a subclass of its class."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), fields)
    return module.__class__


def changed_forward(self, hidden_states, *args, **kwargs):
    output, weights = super(type(self), self).forward(hidden_states, *args, **kwargs)
    return 2 * output, weights


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_said_where_all_is_fused(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = patch(decoder(name)).torch_int4_report
    assert report.unfused == []
    assert "not fused" not in str(report)


@pytest.mark.parametrize("name", ["llama", "falcon", "gptj", "gpt_neox"])
def test_attention_with_another_forward(name):
    """As a later version of transformers may bring it."""
    model = decoder(name)
    family = families.resolve(name)
    (layer,) = [m for m in model.modules() if family.blocks[0].attention in m._modules][1:]
    attention = layer._modules[family.blocks[0].attention]
    kind = type(attention).__name__
    subclass(attention, forward=changed_forward)
    says = f"{kind}: its forward is not one that patches/{name}.py knows {WITH}; 1 runs as a stock module"
    refused(model, says, fused=1, blocks=1)


def test_all_attention_with_another_forward():
    model = decoder("llama")
    for layer in model.model.layers:
        subclass(layer.self_attn, forward=changed_forward)
    says = f"LlamaAttention: its forward is not one that patches/llama.py knows {WITH}; 2 run as stock modules"
    patched = refused(model, says)
    assert patched.torch_int4_report.interfaces == 1
    with torch.no_grad(), Calls() as calls:
        patched(prompt())
    assert calls.counts["attention"] == 2  # by transformers' attention interface, which these modules still call


def test_a_family_that_forgets_the_norms_of_heads():
    knows = families.resolve("qwen3")
    forgetful = dataclasses.replace(knows, attention=dataclasses.replace(knows.attention, norms=None))
    says = "Qwen3Attention: holds q_norm, which its family does not name; 2 run as stock modules"
    refused(decoder("qwen3"), says, family=forgetful)


def test_a_family_of_other_models():
    """Fingerprints know where names agree."""
    says = f"Qwen3Attention: its forward is not one that patches/llama.py knows {WITH}; 2 run as stock modules"
    refused(decoder("qwen3"), says, family="llama")


@pytest.mark.parametrize("place", ["self_attn", "mlp", ""])
def test_children_that_a_layout_does_not_name(place):
    model = decoder("llama")
    layer = model.model.layers[1]
    part = layer._modules[place] if place else layer
    part.add_module("gain", nn.LayerNorm(64))
    kind = {"self_attn": "LlamaAttention", "mlp": "LlamaDecoderLayer", "": "LlamaDecoderLayer"}[place]
    where = "its mlp holds" if place == "mlp" else "holds"
    says = f"{kind}: {where} gain, which its family does not name; 1 runs as a stock module"
    refused(model, says, fused=1 if place == "self_attn" else 2, blocks=1)


def test_dropouts_are_no_children_that_matter():
    model = decoder("llama")
    model.model.layers[0].mlp.add_module("drop", nn.Dropout(0.5))
    report = patch(model).torch_int4_report
    assert (report.blocks, report.unfused) == (2, [])


def test_layers_with_another_forward_norm_or_activation():
    model = decoder("llama")
    first, second = model.model.layers

    class Scaled(type(first.mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    first.mlp.__class__ = Scaled
    second.mlp.act_fn = nn.Tanh()
    with pytest.warns(UserWarning, match="not fused"):
        report = patch(model).torch_int4_report
    assert report.blocks == 0
    assert report.unfused[0] == (
        f"LlamaDecoderLayer: the forward of its mlp is not one that patches/llama.py knows {WITH}; "
        "1 runs as a stock module"
    )
    assert "its activation Tanh is not among SiLU, " in report.unfused[1]
    model = decoder("llama")
    model.model.layers[1].post_attention_layernorm = nn.RMSNorm(64)
    says = (
        "LlamaDecoderLayer: its post_attention_layernorm is a RMSNorm that its family does not know; "
        "1 runs as a stock module"
    )
    refused(model, says, fused=2, blocks=1)


def test_settings_that_no_layout_has():
    llama = families.resolve("llama")
    layout = dataclasses.replace(llama.blocks[0], when=(("hidden_size", 65),))
    says = "LlamaDecoderLayer: has hidden_size = 64, for which the given Family has no layout"
    refused(
        decoder("llama"),
        f"{says}; 2 run as stock modules",
        fused=2,
        family=dataclasses.replace(llama, blocks=(layout,)),
    )


def test_a_decoder_without_attention_that_its_family_knows():
    llama = families.resolve("llama")
    layout = dataclasses.replace(llama.attention, projections=("wq", "wk", "wv"))
    says = (
        f"LlamaForCausalLM: holds no decoder with attention as the given Family has it {WITH}; 1 runs as a stock module"
    )
    refused(decoder("llama"), says, family=dataclasses.replace(llama, attention=layout))


def test_somebody_elses_attention_is_kept(monkeypatch):
    """Who puts a function of their own in the place of transformers' gets what it gives."""

    def louder(module, query, key, value, mask, **kwargs):
        output, weights = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return 2 * output, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", louder)
    model = decoder("llama")
    says = f"LlamaAttention: its attention implementation 'sdpa' is {__name__}.louder; 2 run as stock modules"
    patched = refused(model, says)
    assert patched.torch_int4_report.interfaces == 0
    with torch.no_grad(), Calls() as calls:
        patched(prompt())
    assert calls.attended == 0


def test_nothing_is_said_of_what_was_switched_off():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = patch(decoder("llama"), attention="stock").torch_int4_report
    assert (report.fused, report.blocks, report.unfused) == (0, 0, [])


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_known_fingerprints_are_those_of_this_version(name):
    """One of the layouts of a family fits, whatever version of transformers is installed."""
    family, model = families.resolve(name), decoder(name)
    kinds = {fingerprint(type(module)) for module in model.modules()}
    assert len([layout for layout in family.attentions if kinds & set(layout.forwards)]) == 1
    assert len([layout for layout in family.blocks if layout.forwards[0] in kinds]) == 1
