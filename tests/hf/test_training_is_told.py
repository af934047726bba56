"""Who goes to train all of a patched model is told that its int4 linears do not learn; who trains a part is not."""

import warnings

import pytest
from decoders import decoder
from tiny_models import IDS
from transformers import AutoModelForCausalLM

from torch_int4 import Int4Config, patch


def told(model, *, times=1):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train()
        model.eval()
        model.train()
    lines = [str(each.message) for each in caught if "not trained" in str(each.message)]
    assert len(lines) == times, lines
    return lines


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "bert"])
def test_training_all_is_told_once(name):
    if name == "bert":
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = BertModel(BertConfig(vocab_size=99, **sizes))
    else:
        model = decoder(name)
    (line,) = told(patch(model))
    assert "int4 linears" in line
    assert "Train an adapter" in line


def test_a_loaded_model_tells_and_eval_does_not(tmp_path):
    decoder("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int4Config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()
    told(model)


@pytest.mark.parametrize("kind", ["lora", "prompt", "head"])
def test_training_a_part_is_not(kind):
    model = patch(decoder("llama"), head="float")
    if kind == "head":
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        told(model, times=0)
        return
    peft = pytest.importorskip("peft")
    config = (
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        if kind == "lora"
        else peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    adapted = peft.get_peft_model(model, config)
    told(adapted, times=0)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
