"""PEFT on patched models: adapters are added, trained, saved, loaded and merged as on float models."""

import copy

import pytest
import torch
from decoders import MAIN, Calls, assert_near, decoder, pair, prompt
from oracle import random_weight
from peft import LoraConfig, PeftModel, get_peft_model

from torch_int4 import Int4Error, Int4Linear, patch
from torch_int4.hf.adapters import Int4LoraLinear, mergeable, requantize
from torch_int4.weights.canonical import Int4Weight

KINDS = {
    "symmetric": {},
    "zero-points": {"symmetric": False, "group_size": 64},
    "minima": {"symmetric": False, "zeros": "float", "group_size": -1},
}


def adapted(model, seed=0, **options):
    """With an adapter on every linear that matters."""
    wrapped = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear", "r": 4, **options}))
    fill(wrapped, seed)
    return wrapped.eval()


def fill(model, seed, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def logits(model):
    with torch.no_grad():
        return model(input_ids=prompt()).logits


def packed(model):
    return {
        n: [None if t is None else t.clone() for t in m.packed_state().values()]
        for n, m in model.named_modules()
        if isinstance(m, Int4Linear)
    }


def assert_same_packed(got, want):
    assert got.keys() == want.keys()
    for name in want:
        for a, b in zip(got[name], want[name], strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.parametrize("name", [*MAIN, "qwen2"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_do_what_they_do_on_float_linears(name, options):
    patched, reference = pair(name)
    plain = logits(patched)
    models = [adapted(model, **options) for model in (patched, reference)]
    assert models[0].targeted_module_names == models[1].targeted_module_names
    got, want = (logits(model) for model in models)
    assert_near(got, want, 2e-3)
    assert (got - plain).norm() > 0.01 * plain.norm()
    with torch.no_grad(), Calls() as calls:
        sequences = [m.generate(input_ids=prompt(), max_new_tokens=6, do_sample=False) for m in models]
    assert torch.equal(*sequences)
    assert calls.attended == 2 * 6  # adapters leave the attention fused
    gradients = []
    for model in models:
        model.train()
        model(input_ids=prompt(), labels=prompt()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert_near(gradient, gradients[1][key], 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_compute_in_the_dtype_of_the_model(dtype):
    wrapped = get_peft_model(
        patch(decoder("llama", dtype)), LoraConfig(target_modules="all-linear"), autocast_adapter_dtype=False
    )
    adapters = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    assert len(adapters) == 28
    assert {p.dtype for p in adapters} == {dtype}
    assert logits(wrapped).dtype == dtype


def test_training_lowers_the_loss_and_leaves_the_weights_alone():
    wrapped = get_peft_model(patch(decoder("llama")), LoraConfig(target_modules="all-linear", r=4))
    before = packed(wrapped)
    wrapped.train()
    wrapped.gradient_checkpointing_enable()
    wrapped.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(8):
        loss = wrapped(input_ids=prompt(), labels=prompt()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert_same_packed(packed(wrapped), before)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_trainable_biases_get_gradients_where_the_input_has_none(bias):
    """Linears with one input run as one operator call without a gradient; a bias that wants one must get it."""
    models = [get_peft_model(m, LoraConfig(target_modules="all-linear", r=4, bias=bias)) for m in pair("qwen2")]
    gradients = []
    for model in models:
        fill(model, 0)
        model(input_ids=prompt(), labels=prompt()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert any(n.endswith("q_proj.base_layer.bias") for n in gradients[0]) == (bias == "all")
    for key, gradient in gradients[1].items():
        assert_near(gradients[0][key], gradient, 5e-3)


def test_saved_adapters_hold_nothing_else_and_load_again(tmp_path):
    patched = patch(decoder("llama"))
    fresh = copy.deepcopy(patched)
    wrapped = mergeable(adapted(patched))
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 64 << 10
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(logits(again), logits(wrapped))
    fill(wrapped, 1)
    wrapped.save_pretrained(tmp_path / "other")
    again.load_adapter(tmp_path / "other", "other")
    again.set_adapter("other")
    assert torch.equal(logits(again), logits(wrapped))
    with again.disable_adapter():  # layers with adapters inside are not fused, and round norms a little differently
        assert_near(logits(again), logits(patch(decoder("llama"))), 1e-2)


# Merging


@pytest.mark.parametrize(
    ("name", "kind"), [*(("llama", kind) for kind in KINDS), ("gptj", "minima"), ("falcon", "symmetric")]
)
def test_merged_weights_are_those_of_the_sum(name, kind):
    """They equal what patching the float model makes of its merged weights."""
    patched, reference = pair(name, **KINDS[kind])
    wrapped = mergeable(adapted(patched))
    unmerged = logits(wrapped)
    merged = wrapped.merge_and_unload()
    assert merged is patched
    assert not any(isinstance(m, Int4LoraLinear) for m in merged.modules())
    with Calls() as calls:
        got = logits(merged)
    assert calls.attended == 2
    want = patch(adapted(reference).merge_and_unload(), compute="fp32", kv_cache="fp32", **KINDS[kind])
    assert_near(got, logits(want), 2e-3)
    assert_near(got, unmerged, 0.6)  # 4 bits for random weights
    assert "lora" not in "".join(merged.state_dict())


def test_an_adapter_that_does_nothing_changes_no_bit():
    patched = patch(decoder("llama"), symmetric=False, zeros="float")
    before = packed(patched)
    wrapped = mergeable(get_peft_model(patched, LoraConfig(target_modules="all-linear")))
    assert_same_packed(packed(wrapped.merge_and_unload()), before)


def test_adapters_merge_one_after_the_other_and_come_out_bit_by_bit():
    wrapped = adapted(patch(decoder("qwen2")), lora_bias=True, target_modules=["q_proj", "k_proj"])
    wrapped.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    fill(wrapped, 5)
    mergeable(wrapped)
    before, plain = packed(wrapped), logits(wrapped)
    biases = {n: p.clone() for n, p in wrapped.named_parameters() if n.endswith("base_layer.bias")}
    wrapped.merge_adapter(["default"])
    wrapped.merge_adapter(["b"])
    one_by_one = packed(wrapped)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(one_by_one.values(), before.values(), strict=True))
    wrapped.unmerge_adapter()
    assert_same_packed(packed(wrapped), before)
    assert all(torch.equal(p, biases[n]) for n, p in wrapped.named_parameters() if n in biases)
    assert torch.equal(logits(wrapped), plain)
    wrapped.merge_adapter(["default", "b"])
    assert_same_packed(packed(wrapped), one_by_one)  # rounded once, not once for each


@pytest.mark.parametrize(
    ("options", "value", "reason"),
    [
        ({}, float("nan"), "adapters 'default': holds NaN"),
        ({"use_dora": True}, 1.0, "DoraLinearVariant"),
        ({"lora_bias": True}, 1.0, "linear has none"),
    ],
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_what_cannot_be_merged_says_so_and_changes_nothing(options, value, reason):
    wrapped = mergeable(adapted(patch(decoder("llama")), target_modules=["o_proj"], **options))
    layer = wrapped.base_model.model.model.layers[0].self_attn.o_proj
    layer.lora_B["default"].weight.data[0, 0] = value
    before = packed(wrapped)
    with pytest.raises(Int4Error, match=reason):
        layer.merge()
    assert_same_packed(packed(wrapped), before)
    assert not layer.merged


@pytest.mark.parametrize("bits", [4, 8])
def test_requantizing_keeps_group_size_permutation_and_width(bits):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (33, 100), generator=generator, dtype=torch.uint8)
    weight = Int4Weight(codes, torch.rand(33, 4, generator=generator).half() + 0.1, bits=bits)
    weight.perm = torch.randperm(100, generator=generator)
    linear = Int4Linear.from_weight(weight.validate())
    dense = linear.dequantize() + 0.01
    got = requantize(dense, linear)
    assert torch.equal(got.perm, weight.perm)
    assert (got.group_size, got.bits, got.scales.shape) == (32, bits, (33, 4))
    step = got.scales.float().abs().amax()  # symmetric codes reach 8 steps one way and 7 the other
    assert (got.dequantize() - dense).abs().max() <= (1.01 if bits == 4 else 0.51) * step
    linear.set_weight(got)
    torch.testing.assert_close(linear.dequantize(), got.dequantize())
    other = copy.copy(got)
    other.perm = None
    with pytest.raises(Int4Error, match=r"cannot replace Int4Linear\(in_features=100"):
        linear.set_weight(other)


def test_scales_of_two_levels_are_requantized_with_minima():
    linear = Int4Linear.from_weight(random_weight(33, 512, 32, "records"))
    dense = linear.dequantize() + 0.01
    got = requantize(dense, linear)
    assert got.offsets is not None
    assert (got.dequantize() - dense).abs().max() <= 0.51 * got.scales.float().abs().amax()
    linear.set_weight(got)
    assert torch.equal(linear.dequantize(), got.dequantize())


def test_code_books_are_not_requantized():
    codes = torch.randint(0, 16, (16, 64), dtype=torch.uint8)
    linear = Int4Linear.from_weight(Int4Weight(codes, torch.ones(16, 1).half(), group_size=64, codebook="nf4"))
    with pytest.raises(Int4Error, match="nf4"):
        requantize(linear.dequantize(), linear)
