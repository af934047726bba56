"""A saved int4 model opened as another class: an unused head is left out, a new one is initialised, as for float."""

import pytest
import torch
from tiny_models import IDS, int4s, llama
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaModel

import torch_int4
from torch_int4 import Int4Error, Int4Linear, patch


@pytest.fixture(params=[{"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}, {}], ids=["theirs", "own form"])
def saved(request, tmp_path):
    model = patch(llama(tied=False, **request.param))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def hidden(model):
    with torch.no_grad():
        return model(IDS).last_hidden_state


def test_the_base_model_of_a_language_model(saved):
    model, folder = saved
    base = AutoModel.from_pretrained(folder)
    assert type(base).__name__ == "LlamaModel"
    assert len(int4s(base)) == 14
    assert torch.equal(hidden(base), hidden(model.model))
    assert torch.equal(hidden(torch_int4.from_pretrained(folder, model_class=AutoModel)), hidden(model.model))


def test_a_classifier_of_a_language_model(saved):
    model, folder = saved
    classifier, found = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, output_loading_info=True
    )
    assert found["missing_keys"] == {"score.weight"}
    assert {key.split(".")[0] for key in found["unexpected_keys"]} == {"lm_head"}
    assert torch.equal(hidden(classifier.model), hidden(model.model))
    assert classifier.score.weight.shape == (3, model.config.hidden_size)
    assert 0 < classifier.score.weight.abs().max() < 10


def test_a_language_model_of_a_base_model(tmp_path):
    torch.manual_seed(0)
    base = patch(LlamaModel(llama(tied=False).config).eval())
    base.save_pretrained(tmp_path)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert found["missing_keys"] == {"lm_head.weight"}
    assert isinstance(model.lm_head, Int4Linear)
    assert torch.equal(hidden(model.model), hidden(base))


def test_a_layer_that_is_missing_is_still_an_error(saved):
    _, folder = saved
    for count, reason in ((3, "neither in float nor quantized"), (1, "no linear")):
        config = AutoConfig.from_pretrained(folder, num_hidden_layers=count)
        with pytest.raises(Int4Error, match=reason):
            AutoModelForCausalLM.from_pretrained(folder, config=config)
