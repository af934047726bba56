"""Scales and trained roundings: what they promise, on problems where it shows."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from calibrating import KINDS, output_error, product_error, rows, small, statistics, weights
from torch import nn

from torch_int4 import Int4Config
from torch_int4.calibration.fold_check import checked
from torch_int4.layouts.scales import ScaleFold
from torch_int4.recipes import awq, gptq, hqq, omniquant, rtn, signround, smooth, teq
from torch_int4.recipes.parts import train as _train
from torch_int4.recipes.parts.block import Block, Linear
from torch_int4.recipes.parts.folds import Fold, find
from torch_int4.recipes.parts.train import FakeQuant, Schedule, train


class Layer(nn.Module):
    """A norm and two linears that read it, after each other; outliers come from the norm's weight."""

    def __init__(self, k=96, n=64):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(k)
        self.a, self.b = nn.Linear(k, n), nn.Linear(k, n)
        self.out = nn.Linear(n, k)
        self.norm.weight.data[:4] = 25.0
        self.norm.bias.data.normal_()

    def forward(self, x):
        y = self.norm(x)
        return x + self.out(self.a(y) * self.b(y).sigmoid())


def block_of(layer, config, batches=3, statistics_too=True):
    g = torch.Generator().manual_seed(3)
    data = [torch.randn(4, 6, 96, generator=g) for _ in range(batches)]
    linears = [Linear(f"x.{n}", n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        targets = [layer(x) for x in data]
        if statistics_too:
            inputs = statistics(torch.cat([layer.norm(x) for x in data]).flatten(0, 1))
            y = torch.cat([layer.norm(x) for x in data])
            linears[0].inputs = linears[1].inputs = inputs
            linears[2].inputs = statistics((layer.a(y) * layer.b(y).sigmoid()).flatten(0, 1))

    def run(batch, parameters):
        return torch.func.functional_call(layer, parameters, (data[batch],))

    folds = find(layer, "x", (ScaleFold("norm", ("a", "b")), ScaleFold("a", ("out",))))
    assert len(folds) == 2
    generator = torch.Generator().manual_seed(0)
    return Block("x", layer, linears, folds, run, lambda batch: targets[batch], batches, generator)


def rounded_error(block, config, stage=rtn):
    """Error of the block's output after rounding all its linears."""
    found = {
        linear.key: stage.quantize(linear.weight, config, inputs=linear.inputs).dequantize() for linear in block.linears
    }
    with torch.no_grad():
        pairs = [(block.run(batch, found), block.targets(batch)) for batch in range(block.batches)]
    return sum(F.mse_loss(*pair).item() for pair in pairs)


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


@pytest.mark.parametrize("stage", [signround, omniquant])
@pytest.mark.parametrize("products", ["fp32", "bf16"])  # either may be what the processor is good at
def test_trained_roundings_beat_rounding(stage, products, monkeypatch):
    monkeypatch.setattr(_train, "_has_bf16", lambda: products == "bf16")
    left = []
    for kind in KINDS.values():
        config = Int4Config(group_size=32, preset="light", **kind)
        block = block_of(Layer(), config, statistics_too=False)
        plain = rounded_error(block, config)
        found = stage.round(block, config)
        assert set(found) == {"x.a", "x.b", "x.out"}
        parameters = {linear.key: found[linear.name].dequantize() for linear in block.linears}
        with torch.no_grad():
            error = sum(F.mse_loss(block.run(b, parameters), block.targets(b)).item() for b in range(block.batches))
        left.append(error / plain)
    # Clips gain less, on one small problem 1 to 13 % by the order of additions, which threads and processors change.
    assert max(left) < 0.9 if stage is signround else sum(left) / len(left) < 0.9, left


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "group"), [(200, 32), (96, 32), (300, 128), (130, -1)])
def test_untrained_fake_rounding_is_rtn(kind, k, group):
    config = Int4Config(group_size=group, **KINDS[kind])
    linear = Linear("x", "x", nn.Linear(k, 24))
    w = linear.weight
    quant = FakeQuant(linear, config)
    got, want = quant.freeze(w, quant.low, quant.high), rtn.quantize(w, config)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales, want.scales)
    leaf = w.clone().requires_grad_()
    torch.testing.assert_close(quant.round(leaf, quant.low, quant.high).detach(), got.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_what_is_stored(kind):
    config = Int4Config(group_size=64, **KINDS[kind])
    linear = Linear("x", "x", nn.Linear(200, 24))
    quant = FakeQuant(linear, config, shift=True)
    g = torch.Generator().manual_seed(0)
    quant.shift.uniform_(-0.5, 0.5, generator=g)
    quant.low.uniform_(0.0, 1, generator=g)
    quant.high.uniform_(0.0, 1, generator=g)
    leaf = linear.weight.clone().requires_grad_()
    with torch.enable_grad():
        want = quant.round(leaf, quant.low, quant.high)
    stored = quant.freeze(linear.weight, quant.low, quant.high)
    torch.testing.assert_close(stored.validate("x").dequantize(), want.detach(), rtol=0, atol=0)
    assert torch.isfinite(torch.autograd.grad(want.sum(), leaf)[0]).all()


def straight_through(function, x):
    return x + (function(x) - x).detach()


def rounded_by_autograd(quant, weight, low, high):
    """What `FakeQuant.round` computes, step by step, for groups that fill the rows."""
    kind = quant.grid.kind
    w = weight.unflatten(1, (-1, quant.size))
    least, most = w.amin(2, keepdim=True), w.amax(2, keepdim=True)
    if kind != "float":
        least, most = least.clamp(max=0), most.clamp(min=0)
    least, most = least * low[..., None], most * high[..., None]
    s, z = quant._fit(least, torch.maximum(least, most) if kind == "float" else most)
    x = (w - z if kind == "float" else w) / torch.where(s == 0, 1.0, s) + quant.shift.unflatten(1, (-1, quant.size))
    q = straight_through(torch.round, x)
    q = (q if kind == "float" else q + z).clamp(0, 15)
    return (q * s + z if kind == "float" else (q - z) * s).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_rounding_are_those_of_autograd(kind):
    linear = Linear("x", "x", nn.Linear(128, 24))
    linear.module.weight.data[3, 32:64] = 0
    linear.module.weight.data[4, :32] = 0.25
    quant = FakeQuant(linear, Int4Config(group_size=32, **KINDS[kind]), shift=True)
    g = torch.Generator().manual_seed(0)
    outer, found = torch.randn(24, 128, generator=g), []
    quant.shift.uniform_(-0.5, 0.5, generator=g)
    for factors in (quant.low, quant.high):
        factors.uniform_(0.7, 1, generator=g)
    for function in (rounded_by_autograd, FakeQuant.round):
        quant.shift = quant.shift.detach().requires_grad_()
        leaves = [t.clone().requires_grad_() for t in (linear.weight, quant.low, quant.high)]
        with torch.enable_grad():
            output = function(quant, *leaves)
            found.append([output.detach(), *torch.autograd.grad(output, [*leaves, quant.shift], outer)])
    assert torch.equal(found[0][0], found[1][0])
    for want, got in zip(*found, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_groups_and_zeros_train_without_nan(kind):
    layer = Layer()
    layer.a.weight.data[:, :32] = 0
    layer.b.weight.data[3] = 0.25
    config = Int4Config(group_size=32, preset="light", **KINDS[kind])
    for stage in (signround, omniquant):
        for weight in stage.round(block_of(layer, config), config).values():
            assert torch.isfinite(weight.dequantize()).all()


@pytest.mark.parametrize("bf16", [False, True])
def test_training_keeps_the_best_state(bf16, monkeypatch):
    monkeypatch.setattr(_train, "_has_bf16", lambda: bf16)
    block = block_of(Layer(), CONFIG)
    leaf = torch.zeros(())

    def parameters():
        return {"out.bias": block.module.out.bias.detach() + leaf}

    before, best = train(block, ((leaf,),), parameters, Schedule(16, (5.0,)), signround.SignSGD)
    assert before == best  # every step leads away from the float model
    assert before < 1e-3 if bf16 else before == 0.0
    assert leaf.item() == 0.0
    assert not leaf.requires_grad
    assert all(p.requires_grad for p in block.module.parameters())


def test_sign_descent_ignores_nan_and_size():
    leaf = torch.tensor([1.0, 1.0, 1.0, 1.0], requires_grad=True)
    leaf.grad = torch.tensor([1e-30, -1e30, float("nan"), 0.0])
    signround.SignSGD([leaf], lr=0.25).step()
    assert leaf.tolist() == [0.75, 1.25, 1.0, 1.0]


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
