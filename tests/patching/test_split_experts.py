"""Experts modules of transformers, which keep the weights of all in one tensor, and the patch."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from decoders import decoder, prompt
from tiny_models import int4s, logits

from torch_int4 import Int4Error, patch
from torch_int4.config import Int4Config
from torch_int4.nn.experts import LinearExperts
from torch_int4.patching import experts as splitting
from torch_int4.support.snapshot import Snapshot
from torch_int4.weights.packed import PackedWeight


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, LinearExperts)]


def test_every_weight_of_experts_becomes_int4():
    model = patch(decoder("qwen3_moe"))
    names = [name for name in int4s(model) if ".experts." in name]
    assert len(names) == 2 * 4 * 3
    report = model.torch_int4_report
    assert {entry.name for entry in report.linears} >= set(names)
    assert not any("experts" in name for name, _ in report.skipped)
    assert all("Experts" not in entry.kind for entry in report.floats)
    assert "in float: " in str(report)
    again = patch(model)
    assert again is model
    assert len(experts_of(model)) == 2


def test_nothing_is_copied_and_split_models_compute_the_same():
    model = decoder("mixtral")
    want, stacks = logits(model, prompt()), [m.gate_up_proj for m in model.modules() if hasattr(m, "gate_up_proj")]
    before = Snapshot(model)
    split = splitting.split(model, Int4Config())
    assert split.skipped == []
    assert len(split.names) == len(experts_of(model)) == 2
    for module, stack in zip(experts_of(model), stacks, strict=True):
        assert module.get_submodule("0.gate_proj").weight.data_ptr() == stack.data_ptr()
    torch.testing.assert_close(logits(model, prompt()), want)
    before.restore()
    assert not experts_of(model)
    assert [m.gate_up_proj for m in model.modules() if hasattr(m, "gate_up_proj")] == stacks
    torch.testing.assert_close(logits(model, prompt()), want, rtol=0, atol=0)


def test_a_refused_patch_leaves_experts_as_they_were():
    model = decoder("mixtral")
    keys = list(model.state_dict())
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(Int4Error, match="lm_head"):
        patch(model)
    assert list(model.state_dict()) == keys
    assert not experts_of(model)


def test_skipped_experts_stay_in_one_tensor():
    model = decoder("mixtral")
    patched = patch(copy.deepcopy(model), skip=("*.experts",))
    assert not experts_of(patched)
    assert [reason for name, reason in patched.torch_int4_report.skipped if "experts" in name] == [
        "skip='*.experts'"
    ] * 2
    assert patched.torch_int4_report.floats[0].kind == "MixtralExperts"
    single = patch(copy.deepcopy(model), skip=("model.layers.0.mlp.experts.2",))
    assert [name for name, _ in single.torch_int4_report.skipped] == [
        f"model.layers.0.mlp.experts.2.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert torch.isfinite(logits(single, prompt())).all()


class Louder(torch.nn.Module):
    """Like an experts module of transformers, except for what it computes."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(4, 64, 32))
        self.down_proj = torch.nn.Parameter(torch.randn(4, 32, 32))
        self.act_fn = torch.nn.SiLU()

    def _apply_gate(self, both):
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        given = torch.zeros_like(hidden_states)
        for row, (numbers, shares) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            for number, share in zip(numbers, shares, strict=True):
                both = hidden_states[row] @ self.gate_up_proj[number].t()
                given[row] += 2 * share * (self._apply_gate(both) @ self.down_proj[number].t())
        return given


def test_experts_that_compute_something_else_stay_and_the_report_says_so():
    model = torch.nn.Sequential(Louder(), torch.nn.Linear(32, 32))
    patched = patch(model)
    assert type(patched[0]) is Louder
    assert ("0", "Louder.forward computes more than experts do") in patched.torch_int4_report.skipped


def test_experts_in_an_unknown_form_are_in_the_report():
    patched = patch(decoder("llama4_text"))
    reasons = {reason for name, reason in patched.torch_int4_report.skipped if name.endswith("experts")}
    assert reasons == {"Llama4TextExperts keeps experts in one tensor, in a form that torch_int4 does not know"}


def test_gptq_sees_the_rows_of_each_expert():
    model = decoder("mixtral")
    data = [prompt(1, 24, seed) for seed in range(4)]
    rounded, patched = patch(copy.deepcopy(model)), patch(copy.deepcopy(model), recipe="gptq", calibration=data)
    assert patched.torch_int4_report.experts == 2
    changed = [
        not torch.equal(linear.to_weight().codes, int4s(rounded)[name].to_weight().codes)
        for name, linear in int4s(patched).items()
        if ".experts." in name
    ]
    unseen = sum("no calibration token reached it" in line for line in patched.torch_int4_report.notices)
    assert sum(changed) == len(changed) - unseen > len(changed) // 2


def test_float_weights_of_experts_are_freed_layer_by_layer(monkeypatch):
    model = decoder("mixtral")
    stacks = [weakref.ref(m.gate_up_proj) for m in model.modules() if hasattr(m, "gate_up_proj")]
    left = []
    pack = PackedWeight.pack

    def counting(weight, memory=None):
        left.append(sum(stack() is not None for stack in stacks))
        return pack(weight, memory)

    monkeypatch.setattr(PackedWeight, "pack", counting)
    patch(model)
    assert left[0] == len(stacks) == 2
    assert left[-1] == 0
