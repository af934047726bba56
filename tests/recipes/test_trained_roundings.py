"""Trained roundings: untrained they are rtn, trained they are better, and what was trained is what is stored."""

import pytest
import torch
import torch.nn.functional as F
from block_problems import Layer, block_of, rounded_error
from calibrating import KINDS
from torch import nn

from torch_int4 import Int4Config
from torch_int4.recipes import omniquant, rtn, signround
from torch_int4.recipes.parts import train as _train
from torch_int4.recipes.parts.block import Linear
from torch_int4.recipes.parts.train import FakeQuant, Schedule, train

CONFIG = Int4Config(group_size=32, preset="light")


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
