"""Linears that models need in float: heads for tasks, and linears whose weight is read."""

import copy

import pytest
import torch
from tiny_models import IDS, assert_same_model, dequantized, int4s, linears, llama
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.detr.modeling_detr import DetrMHAttentionMap

from torch_int4 import Int4Linear, patch

SIZES = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
EXACT = {"compute": "fp32", "kv_cache": "fp32"}


def classifier(kind=LlamaForSequenceClassification, config=LlamaConfig):
    torch.manual_seed(0)
    return kind(config(**SIZES, num_labels=2, pad_token_id=0)).eval()


@pytest.mark.parametrize(
    ("kind", "config", "head"),
    [
        (LlamaForSequenceClassification, LlamaConfig, "score"),
        (BertForSequenceClassification, BertConfig, "classifier"),
        (BertForQuestionAnswering, BertConfig, "qa_outputs"),
    ],
)
def test_heads_for_tasks_stay_float_and_are_told(kind, config, head):
    model = classifier(kind, config)
    patched = patch(copy.deepcopy(model), **EXACT)
    assert list(linears(patched)) == [head]
    assert "a head for a task" in dict(patched.torch_int4_report.skipped)[head]
    reference = dequantized(model, patched)
    with torch.no_grad():
        got, want = patched(IDS + 1)[0], reference(IDS + 1)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_head_that_is_named_gets_eight_bits():
    patched = patch(classifier(), int8=("score",))
    assert not linears(patched)
    assert patched.score.to_weight().bits == 8


def test_a_base_model_and_a_language_model_lose_nothing():
    assert not linears(patch(llama()))
    assert not linears(patch(llama().model))
    assert not linears(patch(nn.ModuleDict({"classifier": nn.Linear(64, 64)})))


def test_a_trained_head_is_saved_and_opened(tmp_path):
    patched = patch(classifier())
    patched.save_pretrained(tmp_path)
    again = LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.score.weight, patched.score.weight)
    assert type(again.score) is nn.Linear


def test_mamba_multiplies_with_a_weight_of_its_own():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, state_size=8)).eval()
    patched = patch(copy.deepcopy(model), **EXACT)
    reasons = dict(patched.torch_int4_report.skipped)
    assert "MambaMixer.forward reads its weight" in reasons["backbone.layers.0.mixer.dt_proj"]
    assert "MambaForCausalLM.forward reads its weight" in reasons["lm_head"]
    assert isinstance(patched.backbone.layers[0].mixer.in_proj, Int4Linear)
    assert isinstance(patched.backbone.layers[0].mixer.out_proj, Int4Linear)
    assert_same_model(model, patched, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("slices", [1, 2])
def test_bloom_reads_weights_only_where_it_is_told_to(slices):
    torch.manual_seed(0)
    fields = {"vocab_size": 99, "hidden_size": 64, "n_layer": 1, "n_head": 4}
    model = BloomForCausalLM(BloomConfig(**fields, pretraining_tp=slices, slow_but_exact=True)).eval()
    patched = patch(copy.deepcopy(model), **EXACT)
    left = {name.rsplit(".", 1)[-1] for name in linears(patched)}
    assert left == (set() if slices == 1 else {"dense", "dense_4h_to_h"})
    assert_same_model(model, patched, rtol=1e-3, atol=1e-3)


def test_detr_uses_a_linear_as_a_convolution():
    attention = DetrMHAttentionMap(64, 4).eval()
    query, key = torch.randn(1, 5, 64), torch.randn(1, 64, 3, 3)
    want = copy.deepcopy(attention)
    patch(attention, **EXACT)
    assert list(int4s(attention)) == ["q_proj"]
    want.q_proj.weight.data = attention.q_proj.dequantize()
    with torch.no_grad():
        torch.testing.assert_close(attention(query, key), want(query, key), rtol=1e-3, atol=1e-4)


def test_t5_only_asks_whether_there_is_a_weight():
    config = T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0)
    patched = patch(T5ForConditionalGeneration(config).eval())
    assert not linears(patched)
