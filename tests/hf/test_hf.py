"""Quantizing while loading, saving, and loading what was saved: the bits of `patch`, through transformers."""

import copy
import json
import subprocess
import sys
import types

import pytest
import torch
from decoders import MAIN, decoder, prompt
from tiny_models import IDS, int4s, llama, logits
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import torch_int4
from torch_int4 import Int4Config, Int4Error, Int4Linear, patch
from torch_int4.hf import _register

FULL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # whole groups of 32, as compressed-tensors needs


@pytest.fixture(autouse=True)
def _quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def same(one, other):
    assert list(int4s(one)) == list(int4s(other))
    for name, module in int4s(one).items():
        weights = module.to_weight(), other.get_submodule(name).to_weight()
        for field in ("codes", "scales", "zeros", "offsets", "perm"):
            a, b = (getattr(weight, field) for weight in weights)
            assert (a is None) == (b is None), (name, field)
            assert a is None or torch.equal(a, b), (name, field)
        assert (module.compute, module.compute_dtype) == (other.get_submodule(name).compute, module.compute_dtype)
    return torch.equal(logits(one), logits(other))


LOADED = [*MAIN, "gpt2", "gemma2", "qwen2_moe", "llama-odd", "phi"]


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.filterwarnings("ignore:.*own form")
def test_loading_quantizes_as_patch_does_and_a_saved_model_comes_back(name, tmp_path):
    model = decoder(name)
    saved(model, tmp_path / "float", max_shard_size="40KB")
    config = Int4Config(symmetric=False)
    want = patch(copy.deepcopy(model), config)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert got.torch_int4_report.complete
    assert len(got.torch_int4_report.linears) == len(want.torch_int4_report.linears)
    assert (got.torch_int4_report.merged, got.torch_int4_report.fused) == (
        want.torch_int4_report.merged,
        want.torch_int4_report.fused,
    )
    assert same(want, got)
    saved(got, tmp_path / "int4", max_shard_size="20KB")
    assert (tmp_path / "int4" / "model.safetensors.index.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    assert again.torch_int4_report.merged == got.torch_int4_report.merged
    assert same(got, again)
    tokens = prompt()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(tokens, **options), want.generate(tokens, **options))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["float", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_ties_and_dtypes(tied, head, dtype, tmp_path):
    model = llama(tied, attention_bias=True, dtype=dtype, **FULL)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    saved(model, tmp_path / "float")
    want = patch(AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype="auto"), head=head)
    config = Int4Config(head=head)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, dtype="auto")
    assert same(want, got)
    assert got.dtype == dtype
    saved(got, tmp_path / "int4")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype="auto")
    assert same(got, again)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (tied and head == "float")
    assert again.config.tie_word_embeddings == (tied and head == "float")


@pytest.mark.parametrize(
    "fields",
    [
        {"symmetric": False, "zeros": "float"},
        {"group_size": 64},  # of 72 inputs
        {"group_size": -1, "compute": "int8x2"},
        {"skip": ("*.down_proj", "model.layers.0.self_attn"), "embeddings": "bf16", "attention": "stock"},
        {"kv_cache": "int8", "clip": True},
    ],
)
def test_every_field_travels(fields, tmp_path):
    model = llama(tied=False)
    want = patch(copy.deepcopy(model), **fields)
    if fields.get("zeros") == "float" or fields.get("group_size") != -1:
        with pytest.warns(UserWarning, match=r"model\.layers\.\d\..*own form, which only torch_int4 loads"):
            saved(want, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == "native"
    else:
        saved(want, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(want, again)
    assert again.torch_int4_report.config == want.torch_int4_report.config == Int4Config(**fields)
    assert again.torch_int4_report.skipped == want.torch_int4_report.skipped


def test_what_is_saved_is_compressed_tensors_with_our_fields_beside_it(tmp_path):
    saved(patch(llama(**FULL)), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "compressed-tensors"
    assert described["format"] == "pack-quantized"
    assert described["torch_int4"] == Int4Config().to_dict()
    targets = [group["targets"] for group in described["config_groups"].values()]
    assert targets == [["Linear"], ["lm_head"]]


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = patch(llama(**FULL))
    before = dict(vars(model)), dict(vars(model.config))
    want = logits(model)
    saved(model, tmp_path)
    after = dict(vars(model)), dict(vars(model.config))
    for old, new in zip(before, after, strict=True):
        assert set(new) - set(old) <= {"dtype", "architectures"}
        assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model), want)
    assert "model.layers.0.mlp.up_proj.codes" in model.state_dict()


def test_an_inner_model_saves_itself(tmp_path):
    model = patch(llama(**FULL))
    saved(model.model, tmp_path)
    again = torch_int4.from_pretrained(tmp_path, model_class=type(model.model).torch_int4_base.__mro__[0])
    assert len(int4s(again)) == 14
    with torch.no_grad():
        assert torch.equal(again(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_base_model_loads_from_a_causal_checkpoint(tmp_path):
    from transformers import AutoModel

    model = saved(llama(tied=False, **FULL), tmp_path / "float")
    for folder in (tmp_path / "float", tmp_path / "int4"):
        if folder.name == "int4":
            saved(AutoModelForCausalLM.from_pretrained(model, quantization_config=Int4Config()), folder)
        options = {"quantization_config": Int4Config()} if folder.name == "float" else {}
        base = AutoModel.from_pretrained(folder, **options) if folder.name == "float" else None
        if base is not None:
            assert len(int4s(base)) == 14


def test_generation_config_and_tokenizer_files_travel(tmp_path):
    model = patch(llama(**FULL))
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.3)
    tmp_path.joinpath("tokenizer.json").write_text("{}")
    saved(model, tmp_path)
    assert tmp_path.joinpath("tokenizer.json").read_text() == "{}"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.generation_config.max_new_tokens, again.generation_config.temperature) == (3, 0.3)


def test_patching_a_loaded_model_again_does_nothing_and_another_config_is_refused(tmp_path):
    saved(llama(**FULL), tmp_path)
    model = torch_int4.from_pretrained(tmp_path)
    before = int4s(model)
    assert patch(model, Int4Config()) is model
    assert int4s(model) == before
    with pytest.raises(Int4Error, match="load the model again"):
        patch(model, group_size=64)


def test_a_user_may_choose_how_a_saved_model_computes_but_not_its_grid(tmp_path):
    saved(patch(llama(tied=False, **FULL), head="float"), tmp_path)
    model = torch_int4.from_pretrained(tmp_path, compute="int8x2", head="int8", kv_cache="fp32")
    assert {module.compute for module in int4s(model).values()} == {"int8x2"}
    assert model.lm_head.weight_type == "int8"
    for wrong in ({"group_size": 64}, {"symmetric": False}, {"recipe": "rtn"}):
        with pytest.raises(Int4Error, match=f"quantized already, so {next(iter(wrong))}"):
            torch_int4.from_pretrained(tmp_path, **wrong)
    with pytest.raises(Int4Error, match="as keywords"):
        torch_int4.from_pretrained(tmp_path, Int4Config())


def test_a_config_works_as_a_dict_too(tmp_path):
    saved(llama(**FULL), tmp_path)
    options = {"quant_method": "torch_int4", "group_size": 64}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    assert model.torch_int4_report.config == Int4Config(group_size=64)
    with pytest.raises(Int4Error, match="groupsize"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config={"quant_method": "torch_int4", "groupsize": 64}
        )


def test_a_state_dict_of_floats_is_quantized_too(tmp_path):
    model = llama(tied=False, **FULL)
    saved(model, tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind = type(model)
    got = kind.from_pretrained(None, config=model.config, state_dict=state, quantization_config=Int4Config())
    assert same(patch(copy.deepcopy(model)), got)


def test_configs_are_json_and_come_back():
    config = Int4Config(skip=("a.*", "b"), symmetric=False, group_size=-1)
    assert Int4Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Int4Config.from_dict(json.loads(config.to_json_string())) == config
    assert config.to_diff_dict() == config.to_dict()
    with pytest.raises(Int4Error, match="quant_method"):
        Int4Config.from_dict({"quant_method": "gptq"})
    with pytest.raises(Int4Error, match="bits"):
        Int4Config.from_dict({"bits": 4})


def test_importing_registers_later_and_does_not_import_transformers():
    code = (
        "import sys; import torch_int4; assert 'transformers' not in sys.modules\n"
        "from transformers.quantizers.auto import AutoQuantizationConfig as c\n"
        "print(type(c.from_dict({'quant_method': 'torch_int4'})).__name__)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "Int4Config"


def test_registering_where_transformers_is_loaded_leaves_the_files_of_others_to_others(monkeypatch):
    class Stock:
        @classmethod
        def from_dict(cls, config, **kwargs):
            return "stock"

    auto = types.ModuleType(_register.WATCHED)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING = {"compressed-tensors": Stock}
    auto.AUTO_QUANTIZER_MAPPING = {}
    monkeypatch.setitem(sys.modules, _register.WATCHED, auto)
    _register.install()
    _register.install()  # importing twice changes nothing
    table = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert table["compressed-tensors"].from_dict({"quant_method": "compressed-tensors"}) == "stock"
    assert table["torch_int4"].from_dict({"quant_method": "torch_int4", "clip": True}) == Int4Config(clip=True)
    assert set(auto.AUTO_QUANTIZER_MAPPING) == {"torch_int4"}


def test_the_float_weights_are_never_together_in_memory(tmp_path, monkeypatch):
    """At most one linear exists as floats; placeholders and finished ones hold none."""
    from torch_int4.recipes import rtn

    saved(llama(tied=False, **FULL), tmp_path)
    quantize, seen = rtn.quantize, []

    def watching(weight, config, **options):
        seen.append(options["name"])
        return quantize(weight, config, **options)

    monkeypatch.setattr(rtn, "quantize", watching)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int4Config())
    assert sorted(seen) == sorted(int4s(model))
    assert not any(isinstance(m, torch.nn.Linear) and not isinstance(m, Int4Linear) for m in model.modules())


def test_a_hub_style_config_of_floats_has_no_trace(tmp_path):
    saved(llama(**FULL), tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), "quantization_config", None) is None
