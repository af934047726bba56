"""Layers that a device map gives to the disk are mapped from a file of packed weights."""

import copy
import os

import pytest
import torch
from tiny_models import int4s, is_mapped, llama, logits
from transformers import AutoModelForCausalLM

import torch_int4
from torch_int4 import Int4Config, Int4Error, patch

FULL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def devices(**changed):
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    return {name: changed.get(name.rsplit(".", 1)[-1].replace("1", "one"), "cpu") for name in names}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_layers_given_to_the_disk_are_mapped(quantized, tied, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = llama(tied, attention_bias=True, **FULL)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    (patch(copy.deepcopy(model)) if quantized else model).save_pretrained(tmp_path / "m")
    got = torch_int4.from_pretrained(tmp_path / "m", device_map=devices(one="disk"), offload_folder=tmp_path / "off")
    assert is_mapped(got.model.layers[1].mlp.up_proj)
    assert not is_mapped(got.model.layers[0].mlp.up_proj)
    head = "float" if tied and not quantized else "int8"  # what accelerate moves in and out stays in float
    want = patch(copy.deepcopy(model), attention="stock", kv_cache="fp32", head=head)
    torch.testing.assert_close(logits(got), logits(want), rtol=2e-2, atol=2e-2)
    tokens = got.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 7)
    assert os.listdir(tmp_path / "cache" / "torch_int4" / "panels") == []


def test_a_device_map_of_cpu_alone_is_as_none(tmp_path):
    llama(tied=False, **FULL).save_pretrained(tmp_path)
    for where in ("cpu", {"": "cpu"}, "auto"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int4Config(), device_map=where)
        assert len(int4s(model)) == 15
        assert torch.equal(logits(model), logits(patch(llama(tied=False, **FULL))))


def test_accelerators_are_refused(tmp_path):
    llama(**FULL).save_pretrained(tmp_path)
    for where in ("cuda", {"": "cuda:0"}, 0):
        with pytest.raises(Int4Error, match="device_map"):
            torch_int4.from_pretrained(tmp_path, device_map=where)


def test_memory_is_planned_by_packed_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llama(tied=False, num_hidden_layers=6, **FULL).save_pretrained(tmp_path / "m")
    model = torch_int4.from_pretrained(
        tmp_path / "m", device_map="auto", max_memory={"cpu": 120_000}, offload_folder=tmp_path / "off"
    )
    placed = list(model.hf_device_map.values())
    assert {"cpu", "disk"} == {str(device) for device in placed}
    assert torch.isfinite(logits(model)).all()
