"""Fused decoder layers step back where something inside them is hooked, adapted, replaced, changed or left in float."""

import pytest
import torch
from decoders import Calls, assert_near, pair, prompt
from fused_layers import CLOSE, OPERATORS, fused_layers, unfused
from torch import nn


class Doubled(nn.Module):
    """What an adapter does to a linear."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return 2 * self.base_layer(x)


INNER = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


HOOKED = [*INNER, "self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm"]


@pytest.mark.parametrize("path", HOOKED)
def test_hooks_inside_a_layer_are_called(path):
    patched, plain = pair("llama")[0], unfused("llama")
    results = []
    for model in (patched, plain):
        with torch.no_grad():
            model(prompt())
        module = model.model.layers[1].get_submodule(path)
        double = [module.register_forward_hook(lambda m, a, y: y if isinstance(y, tuple) else 2 * y)]
        double.append(module.register_forward_pre_hook(lambda m, a, k: (tuple(3 * x for x in a), k), with_kwargs=True))
        results.append(fused_layers(lambda model=model: model(prompt()).logits))
        for handle in double:
            handle.remove()
    assert [layers for _, layers in results] == [1, 0]
    assert_near(results[0][0], results[1][0], CLOSE)
    assert fused_layers(lambda: patched(prompt()))[1] == 2


@pytest.mark.parametrize("path", INNER)
def test_adapters_inside_a_layer_are_called(path):
    patched, plain = pair("llama")[0], unfused("llama")
    results = []
    for model in (patched, plain):
        with torch.no_grad():
            model(prompt())
        parent, _, attribute = path.rpartition(".")
        parent = model.model.layers[0].get_submodule(parent)
        setattr(parent, attribute, Doubled(getattr(parent, attribute)))
        results.append(fused_layers(lambda model=model: model(prompt()).logits))
    assert [layers for _, layers in results] == [1, 0]
    assert_near(results[0][0], results[1][0], CLOSE)


@pytest.mark.parametrize("path", [*HOOKED, ""])
def test_a_replaced_forward_is_called(path):
    patched, _ = pair("llama")
    module, seen = patched.model.layers[0].get_submodule(path), []
    stock = module.forward
    module.forward = lambda *args, **kwargs: seen.append(1) or stock(*args, **kwargs)
    _, layers = fused_layers(lambda: patched(prompt()))
    assert seen == [1]
    assert layers == (1 if path else 2)


@pytest.mark.parametrize("pattern", ["*.q_proj", "*.o_proj", "*.gate_proj", "*.down_proj", "*.1.mlp"])
def test_linears_left_in_float(pattern):
    patched, reference = pair("llama", skip=(pattern,))
    logits, layers = fused_layers(lambda: patched(prompt()).logits)
    assert layers == (1 if "1" in pattern else 0)
    with torch.no_grad():
        assert_near(logits, reference(prompt()).logits, CLOSE)


def test_changes_after_patching():
    patched, plain = pair("llama")[0], unfused("llama")
    changes = [
        (lambda layer: setattr(layer.mlp.up_proj, "compute", "int8x2"), 1),
        (lambda layer: setattr(layer.mlp, "act_fn", nn.ReLU()), 0),
        (lambda layer: setattr(layer.self_attn.o_proj, "bias", nn.Parameter(torch.ones(64))), 0),
    ]
    for index, (change, layers_left) in zip((0, 1, 1), changes, strict=True):
        for model in (patched, plain):
            change(model.model.layers[index])
        got, layers = fused_layers(lambda: patched(prompt()).logits)
        assert layers == layers_left
        assert_near(got, fused_layers(lambda: plain(prompt()).logits)[0], CLOSE)
    for model in (patched, plain):
        model.model.layers[0].mlp.up_proj.compute = "fp32"
        model.model.layers[0].input_layernorm.double()  # gives float64, which linears alone multiply
    with torch.no_grad(), Calls() as calls:
        got = patched(prompt()).logits
        assert not set(OPERATORS) & calls.counts.keys()
        assert_near(got, plain(prompt()).logits, CLOSE)
