"""Transforms of scales: their promises, on problems where they show."""

import dataclasses

import pytest
import torch
from block_problems import Layer, block_of, rounded_error
from calibrating import KINDS, output_error, product_error, rows, small, statistics, weights
from torch import nn

from torch_int4 import Int4Config
from torch_int4.calibration.fold_check import checked
from torch_int4.layouts.scales import ScaleFold
from torch_int4.recipes import awq, gptq, hqq, omniquant, rtn, smooth, teq
from torch_int4.recipes.parts.block import Block, Linear
from torch_int4.recipes.parts.folds import Fold, find

CONFIG = Int4Config(group_size=32, preset="light")


@pytest.mark.parametrize("stage", [awq, teq, omniquant])
def test_scales_help_where_inputs_have_outliers_and_change_nothing_else(stage):
    plain, block = block_of(Layer(), CONFIG), block_of(Layer(), CONFIG)
    stage.transform(block, CONFIG)
    with torch.no_grad():
        for batch in range(block.batches):
            torch.testing.assert_close(block.run(batch, {}), block.targets(batch), rtol=1e-4, atol=1e-4)
    most = 0.95 if stage is awq else 0.99  # 50 steps of Adam end anywhere between 0.88 and 0.98 here
    assert rounded_error(block, CONFIG) < most * rounded_error(plain, CONFIG)


def test_smoothing_evens_out_the_inputs():
    block = block_of(Layer(), CONFIG)
    before = block.linears[0].inputs.abs_max.clone()
    smooth.transform(block, CONFIG)
    after = block.linears[0].inputs.abs_max
    assert after.max() / after.median() < 0.5 * before.max() / before.median()
    with torch.no_grad():
        torch.testing.assert_close(block.run(0, {}), block.targets(0), rtol=1e-4, atol=1e-4)


def test_statistics_follow_the_scales():
    layer = Layer()
    block = block_of(layer, CONFIG)
    s = torch.rand(96) + 0.5
    x = torch.randn(50, 96)
    with torch.no_grad():
        before = statistics(layer.norm(x))
        block.linears[0].inputs = block.linears[1].inputs = before
        block.fold(block.folds[0], s)
        after = statistics(layer.norm(x))
    torch.testing.assert_close(before.gram, after.gram, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(before.mean_abs, after.mean_abs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before.abs_max, after.abs_max, rtol=1e-4, atol=1e-5)


def test_the_gram_matrix_gives_the_error_of_the_products():
    x, change = rows(), weights() * 0.1
    want = (x.double() @ change.double().t()).square().sum(0)
    torch.testing.assert_close(statistics(x).error(change).double(), want, rtol=1e-4, atol=1e-6)


def test_inputs_that_never_occur_keep_finite_scales():
    for stage in (awq, smooth):
        block = block_of(Layer(), CONFIG)
        block.linears[0].inputs.abs_sum[5:9] = 0
        block.linears[0].inputs.abs_max[5:9] = 0
        block.linears[0].weight.data[:, 11] = 0
        stage.transform(block, CONFIG)
        assert all(torch.isfinite(p).all() for p in block.module.parameters())


def test_hqq_lowers_the_norm_that_it_is_about():
    w = weights(40, 256)
    w[:, ::37] *= 8
    config = Int4Config(recipe="hqq", group_size=64, **KINDS["float"])

    def distance(weight):
        return (weight.dequantize() - w).abs().pow(hqq.NORM).sum()

    got = hqq.quantize(w, config)
    assert distance(got) < 0.98 * distance(rtn.quantize(w, config))
    assert hqq.quantize(w, config, bits=8).bits == 8
    exact = rtn.quantize(weights(8, 64), config).dequantize()
    assert torch.equal(hqq.quantize(exact, config).dequantize(), exact)


# Folding


def test_shapes_decide_what_fits():
    def linear(n, k):
        return nn.Linear(k, n)

    class Attention(nn.Module):
        def __init__(self, heads, kv, size, fused):
            super().__init__()
            self.size = size
            self.v = linear((heads + 2 * kv) * size if fused else kv * size, 24)
            self.o = linear(24, heads * size)

    for heads, kv, fused in [(4, 4, False), (4, 2, False), (6, 1, False), (4, 4, True), (4, 2, True), (4, 1, True)]:
        (fold,) = find(Attention(heads, kv, 8, fused), "", (ScaleFold("v", ("o",), head_dim="size", fused=fused),))
        assert fold.channels == kv * 8
        s = torch.rand(kv * 8) + 0.5
        assert fold.expand(s).shape == (heads * 8,)
        torch.testing.assert_close(fold.reduce(fold.expand(s)), s)
    assert not find(Attention(4, 3, 8, False), "", (ScaleFold("v", ("o",), head_dim="size"),))
    assert not find(Attention(4, 2, 8, False), "", (ScaleFold("v", ("o",)),))
    assert not find(Attention(4, 4, 8, False), "", (ScaleFold("v", ("missing",)),))


def test_norms_that_add_one_are_found_out_by_the_check():
    class OnePlus(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32) * 0.1)

        def forward(self, x):
            return x * (1 + self.weight)

    class Model(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.norm, self.a, self.b, self.activation = OnePlus(), nn.Linear(32, 32), nn.Linear(32, 32), activation

        def forward(self, x):
            return self.b(self.activation(self.a(self.norm(x))))

    x = torch.randn(5, 32)
    facts = (ScaleFold("norm", ("a",)), ScaleFold("a", ("b",)))
    for activation, holds in ((nn.Identity(), 2), (nn.ReLU(), 2), (nn.GELU(), 1)):
        model = Model(activation)
        before = model.state_dict()
        block = Block("m", model, [Linear("m.a", "a", model.a), Linear("m.b", "b", model.b)])
        folds: list[Fold] = checked(find(model, "m", facts), block, lambda model=model: model(x), "awq")
        assert len(folds) == holds
        assert folds[0].offset == 1.0
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
        assert bool(block.notices) == (holds == 1)
        with torch.no_grad():
            want = model(x)
            folds[0].apply(torch.rand(32) + 0.5)
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


# Whole models


def test_a_transform_before_gptq_helps_on_a_model_with_outliers():
    def outliers(model):
        for layer in model.model.layers:
            layer.input_layernorm.weight.data[:3] *= 20
            layer.post_attention_layernorm.weight.data[:3] *= 20
        return model

    from decoders import decoder

    from torch_int4 import patch

    errors = {}
    for recipe in ("rtn", "awq", "awq+gptq"):
        model = patch(outliers(decoder("llama")), recipe=recipe, calibration=small(), compute="fp32", head="float")
        errors[recipe] = output_error(outliers(decoder("llama")), model)
    assert errors["awq"] < errors["rtn"]
    assert errors["awq+gptq"] < errors["awq"]


def test_gptq_after_a_transform_uses_the_scaled_statistics():
    x, w = rows(), weights()
    inputs, s = statistics(x), torch.rand(200) + 0.5
    inputs.divide(s)
    config = Int4Config(recipe="gptq")
    got = gptq.quantize(w * s, config, inputs=inputs)
    assert product_error(w * s, got, x / s) < 0.5 * product_error(w * s, rtn.quantize(w * s, config), x / s)
    assert dataclasses.asdict(got)["perm"] is None
