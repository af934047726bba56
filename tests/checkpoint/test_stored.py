"""The `quantization_config` of a saved model, as a config that says how its files hold the weights."""

import copy
import dataclasses
import pickle

import pytest
import torch
from tiny_models import int4s, llama, logits
from transformers import AutoModelForCausalLM

from torch_int4 import Int4Config, patch
from torch_int4.checkpoint.stored import BLOCK, Stored, StoredConfig, parse

CONFIG = Int4Config(symmetric=False, kv_cache="int8", skip="lm_head")


def described(config=CONFIG):
    return {"quant_method": "torch_int4", "format": "native", "version": 1, BLOCK: config.to_dict()}


def test_options_of_a_user_are_a_config_and_those_of_files_say_how_weights_are_stored():
    assert type(parse(CONFIG.to_dict())) is Int4Config
    config = parse(described())
    assert isinstance(config, StoredConfig)
    assert config.stored.form.name == "native"
    assert not config.stored.foreign
    assert type(config.plain) is Int4Config
    assert config.plain == CONFIG


def test_how_weights_are_stored_is_no_option():
    config = parse(described())
    assert config.to_dict() == CONFIG.to_dict()
    assert config == dataclasses.replace(config, stored=None)
    assert "stored" not in repr(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.stored = None


def test_copies_keep_how_weights_are_stored():
    config = parse(described())
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config, clip=True)):
        assert isinstance(other.stored, Stored)
        assert other.stored.form.name == "native"


def test_a_loaded_model_has_the_plain_config_and_a_config_given_with_it_is_ignored(tmp_path):
    model = patch(llama(), CONFIG)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"`quantization_config` from the model will be used"):
        got = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int4Config(group_size=128))
    assert type(got.config.quantization_config) is Int4Config
    assert got.torch_int4_report.config == CONFIG
    assert len(int4s(got)) == len(int4s(model))
    assert torch.equal(logits(got), logits(model))
    patch(got, CONFIG)  # the same config, so nothing is done
