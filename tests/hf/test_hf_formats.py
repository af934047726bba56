"""Checkpoints of other tools through `torch_int4.from_pretrained`, and refusals that name tensor and file."""

import copy
import json

import pytest
import torch
from broken_files import hqq, hqq_config
from safetensors.torch import load_file, save_file
from tiny_models import dequantized, int4s, llama, logits
from transformers import AutoModelForCausalLM

import torch_int4
from torch_int4 import Int4Config, Int4Error, formats, patch
from torch_int4.recipes import rtn

FULL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
WRITERS = [name for name in formats.available() if formats.get(name).writes]


def checkpoint(folder, name, *, skip=("lm_head",), **fields):
    """A checkpoint in a format, with the linears of `skip` left in float; returns the weights."""
    model, form, config = llama(tied=False, attention_bias=True, **FULL), formats.get(name), Int4Config(**fields)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    weights = {}
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and key not in skip:
            weights[key] = rtn.quantize(module.weight, config, name=key)
    settings = {key: form.settings_for(weight) for key, weight in weights.items()}
    state = {key: value for key, value in model.state_dict().items() if key.removesuffix(".weight") not in weights}
    for key, weight in weights.items():
        state.update({f"{key}.{s}": t.clone() for s, t in form.write(weight, settings[key], name=key).items()})
    model.config.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = form.describe(settings, list(skip))
    described["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(described))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model, weights


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_a_checkpoint_of_another_tool_is_taken_over(name, symmetric, tmp_path):
    model, weights = checkpoint(tmp_path, name, symmetric=symmetric)
    got = torch_int4.from_pretrained(tmp_path, compute="fp32", kv_cache="fp32")
    assert set(int4s(got)) == set(weights)
    for key, weight in weights.items():
        assert torch.equal(got.get_submodule(key).dequantize(), weight.dequantize()), key
    assert got.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(logits(got), logits(dequantized(model, got)), rtol=1e-4, atol=1e-4)
    got.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(got))
    assert again.torch_int4_report.config == got.torch_int4_report.config


@pytest.mark.parametrize(("name", "file"), [("gptq", "quantize_config.json"), ("awq", "quant_config.json")])
def test_settings_beside_the_config_are_found(name, file, tmp_path):
    """Before transformers kept them in config.json, tools wrote files of their own, without the method's name."""
    _, weights = checkpoint(tmp_path, name)
    described = json.loads((tmp_path / "config.json").read_text())
    settings = described.pop("quantization_config")
    del settings["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / file).write_text(json.dumps(settings))
    got = torch_int4.from_pretrained(tmp_path)
    for key, weight in weights.items():
        assert torch.equal(got.get_submodule(key).dequantize(), weight.dequantize()), key


@pytest.mark.parametrize("name", WRITERS)
def test_linears_left_in_float_stay_so_but_for_a_head_that_is_asked_for(name, tmp_path):
    left = ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    checkpoint(tmp_path, name, skip=left)
    got = torch_int4.from_pretrained(tmp_path, head="int8")
    assert set(left) - set(int4s(got)) == set(left[1:])
    assert got.lm_head.weight_type == "int8"
    assert set(dict(got.torch_int4_report.skipped)) == set(left[1:])


def test_codes_on_no_grid_of_ours_are_rounded_again(tmp_path):
    """HQQ with axis=0, whose groups lie across rows."""
    model, _ = checkpoint(tmp_path, "gptq")
    state, dense = model.state_dict(), {}
    for key in [key for key in state if key.endswith("proj.weight")]:
        tensors, dense[key.removesuffix(".weight")] = hqq(*state.pop(key).shape, 64, axis=0)
        state.update({f"{key.removesuffix('weight')}{suffix}": tensor.clone() for suffix, tensor in tensors.items()})
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = hqq_config(axis=0)
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    got = torch_int4.from_pretrained(tmp_path)
    for name, weight in dense.items():
        want = rtn.quantize(weight.float(), got.torch_int4_report.config).dequantize()
        assert torch.equal(got.get_submodule(name).dequantize(), want), name
    got.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(got))


def broken(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj"


def without(*names):
    return lambda state: [state.pop(name) for name in names]


def with_(name, tensor):
    return lambda state: state.update({name: tensor})


BREAKS = {
    "scales": (without(f"{UP}.weight_scale"), r"up_proj\.weight_scale: is missing"),
    "codes": (without(f"{UP}.weight_packed"), r"up_proj"),
    "all": (without(*(f"{UP}.weight_{s}" for s in ("packed", "scale", "shape"))), r"up_proj\.weight: neither .*shard"),
    "float": (without("lm_head.weight"), r"lm_head\.weight: neither"),
    "shape": (with_(f"{UP}.weight_shape", torch.tensor([64, 64])), r"up_proj\.weight_shape"),
    "rows": (with_(f"{UP}.weight_packed", torch.zeros(4, 8, dtype=torch.int32)), r"up_proj\.weight_packed"),
    "dtype": (with_(f"{UP}.weight_packed", torch.zeros(96, 8)), r"up_proj\.weight_packed"),
    "nan": (with_(f"{UP}.weight_scale", torch.full((96, 2), float("nan"))), r"up_proj.*NaN"),
    "unknown": (with_("model.layers.7.mlp.up_proj.weight_packed", torch.zeros(1, 1, dtype=torch.int32)), r"layers\.7"),
    "norm": (without("model.layers.1.input_layernorm.weight", "model.norm.weight"), r"layernorm\.weight and 1 more: "),
    "bias": (without("model.layers.0.self_attn.q_proj.bias"), r"q_proj\.bias: "),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_damaged_checkpoint_names_tensor_and_file(kind, tmp_path):
    change, message = BREAKS[kind]
    checkpoint(tmp_path, "compressed_tensors")
    broken(tmp_path, change)
    with pytest.raises(Int4Error, match=message) as caught:
        torch_int4.from_pretrained(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_what_is_cut_off_or_no_safetensors_is_refused(tmp_path):
    checkpoint(tmp_path, "compressed_tensors")
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for wrong in (data[:-10], data[:40], b"", b"PK\x03\x04" * 50):
        path.write_bytes(wrong)
        with pytest.raises(Exception, match=r"model\.safetensors|[Ss]afetensors|header|invalid"):
            torch_int4.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    checkpoint(tmp_path, "compressed_tensors")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(Int4Error, match="pickled weights only"):
        torch_int4.from_pretrained(tmp_path)
    with pytest.raises(Int4Error, match="pickled"):
        torch_int4.from_pretrained(tmp_path, use_safetensors=False)


def test_a_shard_that_two_files_claim_is_refused(tmp_path):
    patch(llama(tied=False, **FULL)).save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    one, other = sorted(set(index["weight_map"].values()))[:2]
    save_file({**load_file(tmp_path / one), **load_file(tmp_path / other)}, tmp_path / other, metadata={"format": "pt"})
    with pytest.raises(Int4Error, match="is also in"):
        torch_int4.from_pretrained(tmp_path)


def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path):
    llama(tied=False, **FULL).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "intermediate_size": 128}))
    with pytest.raises(Int4Error, match=r"(gate|up|down)_proj\.weight in .*model\.safetensors: has shape"):
        torch_int4.from_pretrained(tmp_path)


def test_a_bias_that_is_missing_is_named(tmp_path):
    llama(tied=False, attention_bias=True, **FULL).save_pretrained(tmp_path)
    broken(tmp_path, without("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(Int4Error, match=r"layers\.1\.self_attn\.k_proj\.bias: is missing in .*model\.safetensors"):
        torch_int4.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_named_with_their_file(tmp_path):
    model = llama(tied=False, **FULL)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(Int4Error, match=r"layers\.1\.mlp\.down_proj: .*NaN.*model\.safetensors"):
        torch_int4.from_pretrained(tmp_path)
    torch_int4.from_pretrained(tmp_path, skip="model.layers.1.mlp.down_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "native", "version": 3}, "version: 3 is not read"),
        ({"torch_int4": 3}, "must be a table"),
        ({"torch_int4": {"group_size": 5}}, "group_size"),
        ({"torch_int4": {"new_field": 5}}, "new_field"),
        ({"quant_method": "aqlm"}, "aqlm"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*own form")
def test_configs_of_other_versions_and_methods_are_refused(change, message, tmp_path):
    patch(llama(tied=False), symmetric=False, zeros="float").save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(Int4Error, match=message):
        torch_int4.from_pretrained(tmp_path)


def test_configs_are_not_changed(tmp_path):
    from transformers import AutoConfig

    checkpoint(tmp_path, "compressed_tensors")
    config = AutoConfig.from_pretrained(tmp_path)
    before = copy.deepcopy(config.to_dict())
    torch_int4.from_pretrained(tmp_path, model_config=config)
    assert config.to_dict() == before
