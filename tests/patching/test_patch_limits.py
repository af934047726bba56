"""Modules that `patch` leaves in float, refuses, carries over and frees."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import int4s, linears, llama, logits
from torch import nn

import torch_int4
from torch_int4 import Int4Config, Int4Error, Int4Linear, patch
from torch_int4.recipes import rtn

# What is left in float


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("lm_head",), {"lm_head"}),
        (("*.down_proj",), {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        (("model.layers.1.mlp",), {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}),
    ],
)
def test_skip(skip, left):
    model = llama()
    want = copy.deepcopy(model)
    patch(model, skip=skip)
    assert set(linears(model)) == left
    assert all(torch.equal(model.get_submodule(n).weight, want.get_submodule(n).weight) for n in left)
    assert {name for name, _ in model.torch_int4_report.skipped} == left


def test_a_skip_pattern_that_matches_nothing_is_told():
    with pytest.warns(UserWarning, match="q_prj"):
        patch(llama(), skip=("*.q_prj",))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_a_forward_of_its_own_is_only_replaced_when_it_is_a_product():
    model = nn.Sequential(Spelled(64, 64), Doubled(64, 64))
    x = torch.randn(3, 64)
    patch(model)
    assert isinstance(model[0], Int4Linear)
    assert type(model[1]) is Doubled
    assert "Doubled.forward" in model.torch_int4_report.skipped[0][1]
    assert model(x).shape == (3, 64)


def test_computed_and_quantized_weights_are_left_with_a_reason():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)], nn.Linear(64, 0), nn.Linear(0, 8))
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.spectral_norm(model[1])
    model[2].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    patch(model)
    assert list(int4s(model)) == ["3"]
    reasons = dict(model.torch_int4_report.skipped)
    assert set(reasons) == {"0", "1", "2", "4", "5"}
    assert "parametrized" in reasons["0"]
    assert "int8" in reasons["2"]


def test_modules_that_read_weights_themselves_still_work():
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), nn.Linear(64, 64)).eval()
    want = model[0](torch.ones(1, 3, 64))
    patch(model)
    with torch.no_grad():  # torch's fast path, which hands weights to one operator
        torch.testing.assert_close(model[0](torch.ones(1, 3, 64)), want)
    assert isinstance(model[1], Int4Linear)


# Patching again, and refusals


def test_patching_again_with_the_same_config_changes_nothing():
    model = patch(llama(), group_size=64)
    modules, report = int4s(model), str(model.torch_int4_report)
    assert patch(model, Int4Config(group_size=64)) is model
    assert int4s(model) == modules
    assert str(model.torch_int4_report) == report


def test_patching_again_with_another_config_says_to_load_again():
    model = patch(llama(), group_size=64)
    before = logits(model)
    for target in (model, nn.Sequential(model, nn.Linear(64, 64))):
        with pytest.raises(Int4Error, match="load the model again"):
            patch(target, group_size=32)
    assert torch.equal(logits(model), before)


def meta(model):
    model.model.layers[1].mlp.down_proj.to("meta")


def double(model):
    model.model.layers[1].mlp.down_proj.double()


def nan(model):
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")


def offloaded(model):
    model.model.layers[1].mlp.down_proj._hf_hook = object()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [(meta, "meta device"), (double, "float64"), (nan, "NaN"), (offloaded, "accelerate")],
)
def test_a_refusal_names_the_module_and_changes_nothing(harm, reason):
    model = llama()
    harm(model)
    before = dict(model.named_modules())
    with pytest.raises(Int4Error, match=rf"model\.layers\.1\.mlp\.down_proj: .*{reason}"):
        patch(model)
    assert dict(model.named_modules()) == before
    assert model.config.tie_word_embeddings
    assert not hasattr(model, "torch_int4_report")
    patch(model, skip="model.layers.1.mlp.down_proj")  # what the user may do instead


def test_a_model_on_meta_is_refused():
    with torch.device("meta"):
        model = llama()
    with pytest.raises(Int4Error, match=r"q_proj: .*Load the weights"):
        patch(model)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.ReLU()), "no nn.Linear"),
        (nn.Linear(64, 64), "Int4Linear.from_weight"),
        (nn.Sequential(Doubled(64, 64)), "none of its 1 linears.*Doubled"),
        ("a/path", "needs a torch.nn.Module; got str"),
    ],
)
def test_nothing_to_patch(model, reason):
    with pytest.raises(Int4Error, match=reason):
        patch(model)


def test_unknown_options_and_families_are_refused():
    with pytest.raises(Int4Error, match="groupsize"):
        patch(llama(), groupsize=64)
    with pytest.raises(Int4Error, match=r"'lama'.*generic.*llama"):
        patch(llama(), family="lama")


def test_a_failure_half_way_says_so_and_can_be_resumed(monkeypatch):
    quantize, calls = rtn.quantize, []

    def failing(weight, config, **options):
        calls.append(options["name"])
        if len(calls) == 4:
            raise MemoryError("no memory")
        return quantize(weight, config, **options)

    model = llama()
    want = logits(patch(copy.deepcopy(model)))
    monkeypatch.setattr(rtn, "quantize", failing)
    with pytest.raises(Int4Error, match=r"o_proj: conversion failed after 3 of 15.*loaded again"):
        patch(model)
    assert "INCOMPLETE" in str(model.torch_int4_report)
    with pytest.raises(Int4Error, match="load the model again"):
        patch(model, group_size=64)
    patch(model)
    assert model.torch_int4_report.complete
    assert torch.equal(logits(model), want)


# Hooks


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj"])
def test_hooks_go_over_and_their_handles_still_work(name):
    model = llama()
    old = getattr(model.model.layers[0].self_attn, name)
    seen = []
    forward = old.register_forward_hook(lambda m, args, out: seen.append(m))
    pre = old.register_forward_pre_hook(lambda m, args: (torch.zeros_like(args[0]),))
    plain = logits(patch(llama()))
    patch(model)
    new = getattr(model.model.layers[0].self_attn, name)
    assert not torch.equal(logits(model), plain)
    assert seen == [new]
    pre.remove()
    forward.remove()
    seen.clear()
    assert torch.equal(logits(model), plain)
    assert seen == []


# Memory


def test_float_weights_are_freed_layer_by_layer(monkeypatch):
    model = llama(tied=False)
    weights = [weakref.ref(module.weight) for module in linears(model).values()]
    quantize, alive = rtn.quantize, []

    def counting(*args, **options):
        gc.collect()
        alive.append(sum(ref() is not None for ref in weights))
        return quantize(*args, **options)

    monkeypatch.setattr(rtn, "quantize", counting)
    patch(model)
    assert alive == list(range(len(weights), 0, -1))
    gc.collect()
    assert all(ref() is None for ref in weights)


MEASURE = """
import resource
import torch
from torch import nn
import torch_int4

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.ones(4 << 20)  # freed, this makes glibc take the weights from its heap, which it does not return by itself
model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(40)])  # 160 MiB
torch_int4.patch(nn.Sequential(nn.Linear(64, 64)))  # whatever is set up once
before, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch_int4.patch(model)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) >> 10, (before - resident()) >> 20)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_peaks_at_the_float_model_and_falls(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(torch_int4.__file__).parents[1])}
    run = [sys.executable, "-c", MEASURE]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path, env=env, timeout=300)
    above, freed = map(int, done.stdout.split())
    assert above < 18  # MiB: codes and temporaries of one layer, and what is packed before freed floats are returned
    assert freed > 110  # of 160 MiB of floats, 22 come back as int4


@pytest.mark.parametrize("config", [{"num_hidden_layers": 2}, ("a", 1), None, "text", 3])
def test_a_config_of_any_type_is_ignored(config):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config
            self.linears = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    model = patch(Holder())
    assert len(int4s(model)) == 2
    assert model.config is config
    assert model.torch_int4_report.complete
