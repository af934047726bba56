"""Files of models whose linears have extras: whole, damaged, quantized while they are loaded, and beside caches."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import int4s, is_mapped, logits
from toys import EXACT, dense, model_of
from transformers import AutoModelForCausalLM

import torch_int4
from torch_int4 import Int4Config, Int4Error, patch
from torch_int4.hf.adapters import mergeable
from torch_int4.nn.extended import extras_of

pytestmark = [
    pytest.mark.usefixtures("toy_stages"),
    pytest.mark.filterwarnings("ignore:.*own form"),
]
A = "model.layers.1.self_attn.v_proj.extras.low_rank.a"


def saved(folder, **fields):
    model = patch(model_of(), recipe="toy_low_rank", **fields)
    model.save_pretrained(folder)
    return model


def change(folder, tensors=lambda found: None, config=lambda found: None):
    """Edit the files of a saved model."""
    found = load_file(folder / "model.safetensors")
    tensors(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    config(described["quantization_config"])
    (folder / "config.json").write_text(json.dumps(described))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_config_json_says_what_linears_have_and_stops_versions_that_would_leave_it_out(tmp_path):
    saved(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (described["format"], described["version"], described["extras"]) == ("native", 2, {"low_rank": 14})
    patch(model_of(), symmetric=False, zeros="float").save_pretrained(tmp_path / "plain")
    described = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert (described["version"], described.get("extras")) == (1, None)


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (lambda found: found.pop(A), None, r"v_proj\.extras\.low_rank\.a: is missing in the checkpoint, with .*\.b"),
        (
            lambda found: [found.pop(A), found.pop(A[:-1] + "b")],
            None,
            r"14 linears have low_rank, but 13 are in",
        ),
        (
            lambda found: found.update({A: found[A][:, :-1].contiguous()}),
            None,
            r"v_proj\.extras\.low_rank: .*\(in ",
        ),
        (
            lambda found: found.update({A[:-1] + "c": torch.ones(2)}),
            None,
            r"low_rank\.c in .*belongs to no int4",
        ),
        (
            lambda found: found.update({"x.extras.low_rank.a": torch.ones(2)}),
            None,
            r"x\.extras\.low_rank\.a in ",
        ),
        (None, lambda found: found.update(extras={"strips": 3}), r"extras: strips is none of recipe='toy_low_rank'"),
        (None, lambda found: found.update(extras={"low_rank": "all"}), r"extras: must say how many linears"),
        (None, lambda found: found.pop("extras"), r"extras: must say how many linears"),
        (None, lambda found: found.update(version=1), r"extras: must say how many linears"),
        (None, lambda found: found["torch_int4"].update(recipe="rtn"), r"extras: low_rank is none of recipe='rtn'"),
    ],
)
def test_damaged_extras_are_named(tensors, config, words, tmp_path):
    saved(tmp_path)
    change(tmp_path, tensors or (lambda found: None), config or (lambda found: None))
    with pytest.raises(Int4Error, match=words):
        load(tmp_path)


def test_loading_quantizes_as_patch_does(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    want = patch(copy.deepcopy(model), recipe="toy_low_rank")
    got = load(tmp_path, quantization_config=Int4Config(recipe="toy_low_rank"))
    assert torch.equal(logits(got), logits(want))
    assert set(got.torch_int4_report.linears) == set(want.torch_int4_report.linears)


@pytest.mark.parametrize("stored", [True, False])
def test_a_cache_of_panels_loses_no_extras(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_INT4_PANELS", str(tmp_path / "panels"))
    folder, options = tmp_path / "model", {}
    if stored:
        want = logits(saved(folder))
    else:
        model_of().save_pretrained(folder)
        want, options = logits(patch(model_of(), recipe="toy_low_rank")), {"recipe": "toy_low_rank"}
    for _ in range(2):  # the second time from the cache, where there is one
        got = torch_int4.from_pretrained(folder, **options)
        assert torch.equal(logits(got), want)
    assert all(is_mapped(module) == stored for module in int4s(got).values())


def test_linears_on_the_disk_have_their_extras_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    want = logits(saved(tmp_path / "model"))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    got = load(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert is_mapped(got.model.layers[0].mlp.up_proj)
    assert extras_of(got.model.layers[0].mlp.up_proj)
    torch.testing.assert_close(logits(got), want, rtol=1e-5, atol=1e-5)  # hooks of accelerate keep attention stock


def test_adapters_run_on_extended_linears_and_are_not_merged_into_them():
    model = model_of()
    got = patch(copy.deepcopy(model), recipe="toy_low_rank", head="float", **EXACT)
    models = []
    for one in (got, dense(model, got)):
        torch.manual_seed(0)
        wrapped = get_peft_model(one, LoraConfig(target_modules=["up_proj", "q_proj"], r=4, init_lora_weights=False))
        models.append(wrapped.eval())
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-3, atol=1e-3)
    before = logits(models[0])
    with pytest.raises(Int4Error, match=r"extras \(low_rank\) beside its int4 weight; use its adapters unmerged"):
        mergeable(models[0]).merge_adapter()
    assert torch.equal(logits(models[0]), before)
