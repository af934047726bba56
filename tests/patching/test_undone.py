"""After an error at any step the model is what it was, or, once float weights are gone, one that can be patched on."""

import copy
import pkgutil

import pytest
import torch
from tiny_models import int4s, llama, logits
from transformers import GPT2Config, GPT2LMHeadModel

from torch_int4 import Int4Error, patch

EARLY = [
    "convert.calibrated_pass",
    "stages.whole_model",
    "ties.record",
    "convert.convert_foreign",
    "convert.convert_all",
    "convert._results",
    "convert.PackedWeight.pack",
    "convert.Int4Linear",
    "convert.extend",
    "hooks.replace",
]
LATE = [
    "embedding.store_bf16",
    "patcher._merge",
    "patcher.merge_inputs",
    "fuse_attention.fuse",
    "fuse_attention._manage_cache",
    "fuse_attention._manage_generation",
    "fuse_layers.fuse",
    "fuse_layers._known",
    "fuse_stack.fuse",
    "patcher._make_saveable",
    "patcher.return_memory",
]


class BrokenError(Exception):
    pass


def breaking(monkeypatch, step):
    """Lets the first call of a step fail."""
    path = f"torch_int4.patching.{step}"
    stock, calls = pkgutil.resolve_name(path), []

    def fail(*args, **kwargs):
        calls.append(step)
        if len(calls) == 1:
            raise BrokenError(step)
        return stock(*args, **kwargs)

    monkeypatch.setattr(path, fail)
    return calls


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=32, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def things(model):
    """All that a patch could change."""
    modules = [
        (name, id(module), type(module), sorted(vars(module)), list(module._forward_pre_hooks))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    tensors = [(name, id(tensor)) for name, tensor in model.named_parameters(remove_duplicate=False)]
    return modules, tensors, copy.deepcopy(vars(model.config)), copy.deepcopy(model.all_tied_weights_keys)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("step", EARLY)
def test_before_float_weights_are_gone_nothing_is_changed(make, step, monkeypatch):
    model = make()
    before, want = things(model), logits(model)
    calls = breaking(monkeypatch, step)
    with pytest.raises((BrokenError, Int4Error), match=step):
        patch(model, embeddings="bf16")
    assert calls == [step]
    assert things(model) == before
    assert not hasattr(model, "torch_int4_report")
    assert torch.equal(logits(model), want)
    patched = patch(model, embeddings="bf16")
    assert torch.equal(logits(patched), logits(patch(make(), embeddings="bf16")))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("step", LATE)
def test_later_the_model_runs_and_can_be_patched_on(make, step, monkeypatch):
    model, want = make(), logits(patch(make(), embeddings="bf16"))
    calls = breaking(monkeypatch, step)
    try:
        patch(model, embeddings="bf16")
    except (BrokenError, Int4Error):
        assert "INCOMPLETE" in str(model.torch_int4_report)
        assert int4s(model)
        assert (logits(model) - want).norm() < 0.05 * want.norm()
        assert patch(model, embeddings="bf16") is model
    else:
        assert not calls  # a step that this model has not
    assert model.torch_int4_report.complete
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("step", ["fuse_attention.fuse", "patcher._make_saveable"])
def test_a_patched_model_is_what_it_was_after_a_failed_second_patch(step, monkeypatch):
    model = patch(llama())
    model.torch_int4_report.complete = False
    before, want, report = things(model), logits(model), copy.deepcopy(vars(model.torch_int4_report))
    breaking(monkeypatch, step)
    with pytest.raises(BrokenError):
        patch(model)
    assert things(model) == before
    assert vars(model.torch_int4_report) == report
    assert torch.equal(logits(model), want)
