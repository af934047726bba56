"""Sparse models loaded and saved: experts that files hold one by one, or in one tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import decoder, prompt
from safetensors import safe_open
from tiny_models import logits

import torch_int4
from torch_int4 import patch
from torch_int4.nn.experts import LinearExperts

# Those whose float checkpoints have a tensor for each expert; in the others one tensor holds all.
APART = ["mixtral", "phimoe", "qwen2_moe", "deepseek_v3", "lfm2_moe", "ernie4_5_moe"]
TOGETHER = ["gpt_oss", "granitemoe"]


def keys_of(folder):
    return [key for file in folder.glob("*.safetensors") for key in safe_open(file, "pt").keys()]  # noqa: SIM118


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, LinearExperts)]


@pytest.mark.oldest
@pytest.mark.parametrize("name", [*APART, *TOGETHER])
def test_loading_is_patching_and_saving_loses_nothing(name, tmp_path):
    model = decoder(name)
    patched = patch(copy.deepcopy(model))
    want = logits(patched, prompt())
    model.save_pretrained(tmp_path / "float")
    apart = any(".0." in key.partition("experts")[2] for key in keys_of(tmp_path / "float"))
    assert apart == (name in APART)
    loaded = torch_int4.from_pretrained(tmp_path / "float")
    for given, folder in ((patched, "patched"), (loaded, "loaded")):
        assert len(experts_of(given)) == len(experts_of(patched)) > 0
        assert given.torch_int4_report.experts == patched.torch_int4_report.experts
        torch.testing.assert_close(logits(given, prompt()), want, rtol=0, atol=0)
        given.save_pretrained(tmp_path / folder)
        again = torch_int4.from_pretrained(tmp_path / folder)
        assert again.torch_int4_report.experts == patched.torch_int4_report.experts
        torch.testing.assert_close(logits(again, prompt()), want, rtol=0, atol=0)


def test_a_missing_expert_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    model = patch(decoder("qwen2_moe"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".experts.3.up_proj" not in name}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(torch_int4.Int4Error, match=r"experts\.3\.up_proj"):
        torch_int4.from_pretrained(tmp_path)


def test_skipped_experts_stay_as_files_have_them(tmp_path):
    decoder("mixtral").save_pretrained(tmp_path / "float")
    loaded = torch_int4.from_pretrained(tmp_path / "float", skip=("*.experts",))
    assert not experts_of(loaded)
    loaded.save_pretrained(tmp_path / "int4")
    again = torch_int4.from_pretrained(tmp_path / "int4")
    assert not experts_of(again)
    torch.testing.assert_close(logits(again, prompt()), logits(loaded, prompt()), rtol=0, atol=0)
