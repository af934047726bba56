"""Every kind of adapter that PEFT has on int4 linears: it works, or says why not and changes nothing."""

import copy

import peft
import pytest
import torch
from tiny_models import IDS, llama, logits
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from torch_int4 import Int4Error, Int4Linear, patch

Q = {"target_modules": ["q_proj"]}
READERS = {
    "pissa": lambda: peft.LoraConfig(init_lora_weights="pissa", **Q),
    "olora": lambda: peft.LoraConfig(init_lora_weights="olora", **Q),
    "loha": lambda: peft.LoHaConfig(**Q),
    "lokr": lambda: peft.LoKrConfig(**Q),
    "hra": lambda: peft.HRAConfig(**Q),
    "shira": lambda: peft.ShiraConfig(r=2, **Q),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
}
ADDERS = {
    "lora": lambda: peft.LoraConfig(**Q),
    "dora": lambda: peft.LoraConfig(use_dora=True, **Q),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **Q),
    "vera": lambda: peft.VeraConfig(**Q),
}


def things(model):
    """What the modules of a model are and hold."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()], sorted(vars(model))


@pytest.mark.parametrize("kind", READERS)
def test_kinds_that_read_weights_are_refused_and_change_nothing(kind):
    model = patch(llama())
    before, want = things(model), logits(model)
    with pytest.raises(Int4Error, match="needs the float weight of a linear"):
        peft.get_peft_model(model, READERS[kind]())
    assert things(model) == before
    assert torch.equal(logits(model), want)
    peft.get_peft_model(model, ADDERS["lora"]())  # and another kind can be had still


@pytest.mark.parametrize("kind", READERS)
def test_they_work_beside_int4_linears(kind):
    model = patch(llama(), skip=("*.self_attn",))
    wrapped = peft.get_peft_model(model, READERS[kind]())
    assert logits(wrapped).isfinite().all()


@pytest.mark.parametrize("kind", ADDERS)
def test_kinds_that_add_to_outputs_train(kind):
    wrapped = peft.get_peft_model(patch(llama()), ADDERS[kind]())
    wrapped(input_ids=IDS).logits.sum().backward()
    assert any(p.grad is not None for p in wrapped.parameters())


@pytest.mark.parametrize("kind", ["dora", "ia3", "vera"])
def test_those_that_cannot_be_merged_say_so(kind):
    wrapped = peft.get_peft_model(patch(llama()), ADDERS[kind]()).eval()
    want = logits(wrapped)
    with pytest.raises(Int4Error, match="merg"):
        wrapped.merge_and_unload()
    assert torch.equal(logits(wrapped), want)


def test_lora_merges_without_being_asked_to():
    wrapped = peft.get_peft_model(patch(llama(), compute="fp32"), ADDERS["lora"]()).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    want = logits(wrapped)
    merged = wrapped.merge_and_unload()
    assert isinstance(merged.model.layers[0].self_attn.q_proj, Int4Linear)
    assert 0 < (logits(merged) - want).norm() < 0.2 * want.norm()


def test_a_copy_that_is_trained_is_a_float_linear(tmp_path):
    model = patch(llama())
    head, want = model.lm_head, logits(model)
    config = peft.LoraConfig(modules_to_save=["lm_head"], **Q)
    wrapped = peft.get_peft_model(model, config)
    copied = wrapped.base_model.model.lm_head.modules_to_save["default"]
    assert type(copied) is nn.Linear
    assert copied.weight.requires_grad
    assert torch.equal(copied.weight, head.dequantize())
    torch.testing.assert_close(logits(wrapped), want, rtol=0.05, atol=0.05)
    with torch.no_grad():
        copied.weight.mul_(2)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(patch(llama()), tmp_path)
    assert torch.equal(logits(again.eval()), logits(wrapped.eval()))


def test_heads_for_tasks_are_trained():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=99, **sizes, num_labels=3, pad_token_id=0))
    wrapped = peft.get_peft_model(patch(copy.deepcopy(model)), peft.LoraConfig(task_type="SEQ_CLS", **Q))
    names = [name for name, p in wrapped.named_parameters() if p.requires_grad and "score" in name]
    assert names == ["base_model.model.score.modules_to_save.default.weight"]
