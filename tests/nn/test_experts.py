"""Experts modules whose weights are linears: what one operator runs, and what runs linear by linear."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from decoders import SPARSE, Calls, assert_near, decoder, pair, prompt

from torch_int4 import Int4Linear, patch
from torch_int4.nn.experts import LinearExperts, prepare, sum_of_experts

OTHERS = ("gpt_oss-limits",)  # whose activation no operator has
MODELS = [*SPARSE, *OTHERS, "mixtral", "phimoe", "qwen2_moe", "qwen3_moe"]


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, LinearExperts)]


def routed(experts, rows=7, dtype=torch.float32):
    """x, two experts of each row, and their shares."""
    features = experts.get_submodule("0.up_proj").in_features
    count = experts.torch_int4_data.count
    generator = torch.Generator().manual_seed(rows)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(rows)])
    x = torch.randn(rows, features, generator=generator).to(dtype)
    return x, chosen, torch.rand(rows, 2, generator=generator).to(dtype)


@pytest.fixture
def patched():
    return patch(decoder("mixtral"), kv_cache="fp32")


@pytest.mark.oldest
@pytest.mark.parametrize("name", MODELS)
def test_models_give_what_their_weights_say(name):
    patched, reference = pair(name)
    found = experts_of(patched)
    assert found
    assert patched.torch_int4_report.experts == (0 if name in OTHERS else len(found))
    ids = prompt()
    with torch.no_grad(), Calls() as calls:
        got = patched(ids).logits
    assert calls.counts["prepared_experts"] == patched.torch_int4_report.experts
    with torch.no_grad():
        assert_near(got, reference(ids).logits, 2e-5)
        mine = patched.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(mine, reference.generate(ids, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe"])
def test_recorded_choices_and_their_loss(name):
    patched, reference = pair(name)
    ids = prompt()
    with torch.no_grad():
        plain = reference(ids, labels=ids).loss
        torch.testing.assert_close(patched(ids, labels=ids).loss, plain)
        got, want = (model(ids, labels=ids, output_router_logits=True) for model in (patched, reference))
        torch.testing.assert_close(patched(ids, labels=ids).loss, plain)  # now with what transformers records by
    assert len(got.router_logits) == len(want.router_logits) == 2
    for a, b in zip(got.router_logits, want.router_logits, strict=True):
        assert_near(a, b, 2e-5)
    torch.testing.assert_close((got.loss, got.aux_loss), (want.loss, want.aux_loss))
    assert want.aux_loss > 0


@pytest.mark.parametrize("compute", ["int8", "int8x2", "bf16", "fp32"])
def test_one_operator_gives_what_the_linears_do(compute):
    (experts, _) = experts_of(patch(decoder("mixtral"), compute=compute))
    for rows in (1, 2, 40):
        x, chosen, shares = routed(experts, rows)
        with torch.no_grad(), Calls() as calls:
            got = experts(x, chosen, shares)
        assert calls.counts == {"prepared_experts": 1}
        with torch.no_grad():
            torch.testing.assert_close(got, sum_of_experts(experts, x, chosen, shares), rtol=1e-5, atol=1e-6)


def test_gradients_go_through_the_linears(patched):
    experts = experts_of(patched)[0]
    x, chosen, shares = routed(experts)
    x.requires_grad_(), shares.requires_grad_()
    with Calls() as calls:
        y = experts(x, chosen, shares)
    assert calls.counts["prepared_experts"] == 0
    y.square().sum().backward()
    assert x.grad.count_nonzero()
    assert shares.grad.count_nonzero()
    with torch.no_grad():
        torch.testing.assert_close(experts(x, chosen, shares), y)


def scaled(linear):
    weight = linear.to_weight()
    weight.scales.mul_(2)
    return weight


CHANGES = {
    "weight": lambda experts: experts.get_submodule("1.down_proj").set_weight(
        scaled(experts.get_submodule("1.down_proj"))
    ),
    "linear": lambda experts: setattr(
        experts.get_submodule("1"), "up_proj", Int4Linear(scaled(experts.get_submodule("1.up_proj")))
    ),
    "expert": lambda experts: setattr(experts, "2", copy.deepcopy(experts.get_submodule("0"))),
    "scales": lambda experts: experts.get_submodule("0.gate_proj")._buffers.update(
        packed_scales=experts.get_submodule("0.gate_proj").packed_scales * 3
    ),
    "hook": lambda experts: experts.get_submodule("3.up_proj").register_forward_hook(lambda m, x, y: y * 0),
    "float": lambda experts: setattr(experts.get_submodule("1"), "down_proj", torch.nn.Linear(96, 64)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_experts_count(patched, name):
    experts = experts_of(patched)[0]
    x, chosen, shares = routed(experts)
    with torch.no_grad():
        before = experts(x, chosen, shares)
        CHANGES[name](experts)
        after = experts(x, chosen, shares)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, sum_of_experts(experts, x, chosen, shares), rtol=1e-5, atol=1e-6)


def test_experts_of_several_types_run_one_after_the_other():
    model = patch(decoder("mixtral"), int8=("*.experts.1.down_proj",))
    assert model.torch_int4_report.experts == 0
    assert "experts: 0 of 2 layers" in str(model.torch_int4_report)
    experts = experts_of(model)[0]
    assert prepare(experts) is None
    with torch.no_grad():
        assert experts(*routed(experts)).count_nonzero()


def test_copies_and_pickles_stand_for_themselves(patched):
    experts = experts_of(patched)[0]
    given = routed(experts)
    with torch.no_grad():
        want = experts(*given)
        for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
            assert other.torch_int4_prepared is None
            assert torch.equal(other(*given), want)
            other.get_submodule("0.up_proj").packed_scales.mul_(2)
            assert not torch.equal(other(*given), want)
        assert torch.equal(experts(*given), want)


def test_half_precision(patched):
    experts = experts_of(patched)[0]
    given = routed(experts)
    with torch.no_grad():
        want = experts(*given)
        for dtype in (torch.bfloat16, torch.float16):
            x, chosen, shares = routed(experts, dtype=dtype)
            got = patched.to(dtype) and experts(x, chosen, shares)
            assert got.dtype == dtype
            assert_near(got.float(), want, 2e-2)


def test_graphs_hold_the_operator(patched):
    experts = experts_of(patched)[0]
    given = routed(experts)
    with torch.no_grad():
        compiled = torch.compile(lambda *args: experts(*args), fullgraph=True)
        assert torch.equal(compiled(*given), experts(*given))
