"""Scores of windows, and the damage that each linear does alone."""

import copy

import pytest
import torch
from calibrating import tokens
from decoders import decoder

import torch_int4
from torch_int4 import Int4Config, Int4Error
from torch_int4.tuning.scoring import WindowTask, compare
from torch_int4.tuning.sensitivity import Layer, choose, damage

BASE = {"compute": "fp32", "kv_cache": "fp32", "head": "float"}
FINE = Int4Config(recipe="rtn", group_size=32, **BASE)


def test_windows_are_scored_as_a_language_model_is():
    model, ids = decoder("llama").train(), tokens().view(16, 24)
    scores = WindowTask(ids).scores(model)
    assert model.training
    model.eval()
    with torch.no_grad():
        want = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    torch.testing.assert_close(scores.values, torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert scores.weights.tolist() == [23.0] * 16


def test_kl_is_zero_for_the_float_model_and_grows_with_the_damage():
    model = decoder("llama")
    task = WindowTask(tokens().view(16, 24), "kl", "kl")
    base = task.scores(model)
    assert base.values.abs().max() < 1e-3
    losses = []
    for size in (32, -1):
        other = torch_int4.patch(copy.deepcopy(model), group_size=size, **BASE)
        losses.append(compare(task, base, task.scores(other)).loss)
    assert 0 < losses[0] < losses[1]


@pytest.mark.parametrize("kind", ["accuracy", "nonsense"])
def test_window_tasks_know_two_kinds(kind):
    with pytest.raises(Int4Error, match="kind must be"):
        WindowTask(tokens().view(16, 24), kind=kind)
    with pytest.raises(Int4Error, match="needs windows"):
        WindowTask(tokens())


def test_damage_is_that_of_each_linear_alone_and_leaves_the_model_alone():
    model = decoder("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[5] *= 40  # an outlier that spoils its groups
    before = {n: p.clone() for n, p in model.named_parameters()}
    layers = damage(model, FINE, tokens().view(16, 24))
    assert len(layers) == 8
    assert layers == sorted(layers, key=lambda layer: -layer.per_byte)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(layer.kl > 0 for layer in layers)


def test_as_few_layers_as_it_takes():
    layers = [Layer(str(i), kl, 1000) for i, kl in enumerate([0.5, 0.3, 0.1, 0.06, 0.04])]
    assert choose(layers, 0, 0.02, 0.01) == 2  # 0.2 of 1.0 is left, 0.4 would do
    assert choose(layers, 0, 0.0101, 0.01) == 1
    assert choose(layers, 1, 0.0101, 0.01) == 2
    assert choose(layers, 0, 100.0, 0.01) == 5
    assert choose(layers, 5, 0.02, 0.01) == 5
    assert choose(layers, 0, float("inf"), 0.01) == 5
