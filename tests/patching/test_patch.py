import copy

import pytest
import torch
from tiny_models import IDS, assert_same_model, dequantized, int4s, linears, llama, logits
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from torch_int4 import Int4Config, Int4Linear, patch
from torch_int4.layouts.family import Family
from torch_int4.patching import families
from torch_int4.recipes import rtn

# The main job


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["float", "int4", "int8"])
@pytest.mark.parametrize("offsets", [{}, {"symmetric": False}, {"symmetric": False, "zeros": "float"}])
def test_llama_computes_with_the_dequantized_weights(tied, head, offsets):
    model = llama(tied)
    patched = copy.deepcopy(model)
    assert patch(patched, compute="fp32", kv_cache="fp32", head=head, **offsets) is patched
    assert len(int4s(patched)) == 2 * 7 + (head != "float")
    assert list(linears(patched)) == (["lm_head"] if head == "float" else [])
    assert_same_model(model, patched, rtol=1e-4, atol=1e-4)


def test_int8_products_are_close():
    model = llama()
    patched = patch(copy.deepcopy(model))
    want, got = logits(dequantized(model, patched)), logits(patched)
    assert (got - want).norm() < 0.05 * want.norm()
    assert (got - want).norm() > 0  # or this does not test the default arithmetic


def test_generate_runs_and_agrees():
    model = llama()
    patched = patch(copy.deepcopy(model), compute="fp32", kv_cache="fp32")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = dequantized(model, patched).generate(IDS, **options)
    assert torch.equal(patched.generate(IDS, **options), want)


def test_the_recipe_gets_each_weight_and_the_config():
    model = llama()
    patched = patch(copy.deepcopy(model), Int4Config(group_size=64, symmetric=False), clip=True)
    config = Int4Config(group_size=64, symmetric=False, clip=True)
    for name, module in int4s(patched).items():
        bits = 8 if name == "lm_head" else 4
        want, got = rtn.quantize(model.get_submodule(name).weight, config, bits=bits), module.to_weight()
        assert torch.equal(got.codes, want.codes), name
        assert torch.equal(got.scales, want.scales), name
    assert patched.torch_int4_report.config == config


def test_the_report_measures_what_happened():
    model = patch(llama(tied=False), skip="model.layers.1.mlp.down_proj")
    report = model.torch_int4_report
    weights = 2 * (72 * 72 * 2 + 36 * 72 * 2 + 104 * 72 * 3) - 104 * 72
    assert report.complete
    assert report.bytes_before(4) == 4 * weights
    assert report.bytes_bf16(4) == 2 * weights
    assert report.bytes_after(8) == int4s(model)["lm_head"].nbytes
    assert 4.5 <= report.bits_per_weight(4) < 8  # panels of 16 rows and slabs of 32 inputs are padded
    assert report.merged == 4
    assert report.skipped == [("model.layers.1.mlp.down_proj", "skip='model.layers.1.mlp.down_proj'")]
    text = str(report)
    assert "int4: 13 linears" in text
    assert "int8: 1 linears" in text
    assert "left in float: model.layers.1.mlp.down_proj" in text
    assert "INCOMPLETE" not in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_bias_and_training_mode_are_kept(dtype):
    model = llama(dtype=dtype, attention_bias=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    model.model.layers[0].train()
    patched = patch(copy.deepcopy(model), compute="fp32", kv_cache="fp32")
    assert (patched.dtype, patched.device) == (dtype, torch.device("cpu"))
    assert logits(patched).dtype == dtype
    q_proj = patched.model.layers[0].self_attn.q_proj
    assert q_proj.bias.dtype == dtype
    assert torch.equal(q_proj.bias, model.model.layers[0].self_attn.q_proj.bias)
    assert q_proj.training
    assert not patched.model.layers[1].self_attn.q_proj.training
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert_same_model(model.eval(), patched.eval(), rtol=tolerance, atol=tolerance)


# The head and tied weights


def test_a_tied_head_is_quantized_and_the_embedding_stays():
    model = llama(tied=True)
    table = model.model.embed_tokens.weight
    patch(model)
    assert model.model.embed_tokens.weight is table
    assert isinstance(model.lm_head, Int4Linear)
    assert model.lm_head.to_weight().bits == 8
    assert "lm_head: its float weight stays" in str(model.torch_int4_report)
    assert model.config.tie_word_embeddings is False
    before = logits(model)
    model.tie_weights()
    model.tie_weights(recompute_mapping=False)
    assert isinstance(model.lm_head, Int4Linear)
    assert model.lm_head.weight is None
    assert torch.equal(logits(model), before)
    model.config.tie_word_embeddings = True  # even so there is nothing left to tie
    model.tie_weights()
    assert torch.equal(logits(model), before)
    assert LlamaForCausalLM._tied_weights_keys  # the class is not changed


def test_a_tied_float_head_is_left_alone():
    model = patch(llama(tied=True), head="float")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert ("lm_head", "head='float'") in model.torch_int4_report.skipped


def test_a_head_that_scales_by_the_tie_flag_keeps_scaling():
    """UMT5 multiplies the input of its head when `config.tie_word_embeddings`, so the flag has to stay."""
    torch.manual_seed(0)
    config = UMT5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=1, num_decoder_layers=1, num_heads=4, vocab_size=99,
        tie_word_embeddings=True, decoder_start_token_id=0,
    )  # fmt: skip
    model = UMT5ForConditionalGeneration(config).eval()
    patched = patch(copy.deepcopy(model), compute="fp32", kv_cache="fp32")
    assert isinstance(patched.lm_head, Int4Linear)
    patched.tie_weights()
    assert patched.encoder.embed_tokens.weight is patched.shared.weight  # the other ties are still there
    reference = dequantized(model, patched)
    with torch.no_grad():
        got = patched(input_ids=IDS, decoder_input_ids=IDS).logits
        want = reference(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_linears_that_share_a_parameter_are_each_right():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    patch(model, compute="fp32", kv_cache="fp32")
    assert torch.equal(model[0].to_weight().codes, model[1].to_weight().codes)
    assert not model.torch_int4_report.linears[0].shared  # no module keeps the float weight


def test_a_linear_held_by_two_parents_stays_one_module():
    model = nn.Module()
    model.a, model.b = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))
    model.b[0] = model.a[0]
    patch(model)
    assert isinstance(model.a[0], Int4Linear)
    assert model.a[0] is model.b[0]
    assert len(model.torch_int4_report.linears) == 1


# Embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_in_bf16(tied):
    model = llama(tied)
    want = model.model.embed_tokens(IDS).bfloat16().float()
    patch(model, embeddings="bf16")
    table = model.model.embed_tokens
    assert table.weight.dtype == torch.bfloat16
    assert torch.equal(table(IDS), want)
    assert model.dtype == torch.float32
    assert logits(model).dtype == torch.float32
    assert model.get_input_embeddings() is table
    assert model.torch_int4_report.embeddings == [("model.embed_tokens", 4 * 99 * 72, 2 * 99 * 72)]
    assert table.to(torch.float16)(IDS).dtype == torch.float16
    assert table.weight.dtype == torch.bfloat16


def test_an_embedding_tied_to_a_float_head_stays():
    model = patch(llama(tied=True), embeddings="bf16", head="float")
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "shared" in dict(model.torch_int4_report.skipped)["model.embed_tokens"]


# Families


@pytest.mark.parametrize("name", families.available())
def test_every_family_file_is_data(name):
    family = families.resolve(name)
    assert isinstance(family, Family)
    assert all(len(set(group)) == len(group) >= 2 for group in family.shared_inputs)


def test_families_are_found_by_model_type():
    assert families.find("llama") is families.resolve("llama")
    for other in (None, "", "no_such_model", "patcher", "families", "_scan", "../llama"):
        assert families.find(other) is families.resolve("generic")


def test_the_family_of_a_part_is_found_by_its_own_config():
    model = nn.ModuleDict({"language": llama(), "other": nn.Linear(64, 64)})
    patch(model)
    assert model.torch_int4_report.merged == 4
    assert isinstance(model["other"], Int4Linear)


def test_a_family_can_be_given():
    assert patch(llama(), family="generic").torch_int4_report.merged == 0
    only = Family(shared_inputs=(("gate_proj", "up_proj"),))
    assert patch(llama(), family=only).torch_int4_report.merged == 2


@pytest.mark.parametrize("skipped", ["*.q_proj", "*.v_proj"])
def test_incomplete_groups_are_not_merged(skipped):
    model = llama()
    patched = patch(copy.deepcopy(model), compute="fp32", kv_cache="fp32", skip=(skipped,))
    assert patched.torch_int4_report.merged == 2
    assert_same_model(model, patched, rtol=1e-4, atol=1e-4)


def test_falcon_has_linears_of_its_own_class():
    torch.manual_seed(0)
    config = FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    model = FalconForCausalLM(config).eval()
    patched = patch(copy.deepcopy(model), compute="fp32", kv_cache="fp32")
    assert not linears(patched)
    assert len(int4s(patched)) == 2 * 4 + 1
    assert_same_model(model, patched, rtol=1e-3, atol=1e-3)


def test_gpt2_has_transposed_weights():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=32, initializer_range=0.1)
    model = GPT2LMHeadModel(config).eval()
    patched = patch(copy.deepcopy(model), compute="fp32", kv_cache="fp32")
    assert len(int4s(patched)) == 2 * 4 + 1
    assert int4s(patched)["transformer.h.0.attn.c_attn"].out_features == 3 * 64
    assert_same_model(model, patched, rtol=1e-3, atol=1e-3)


def test_any_module_can_be_patched():
    model = nn.Sequential(nn.Linear(33, 65), nn.GELU(), nn.Linear(65, 7, bias=False))
    want = copy.deepcopy(model)
    x = torch.randn(2, 3, 33)
    patch(model, compute="fp32", kv_cache="fp32")
    got = model(x)
    for old, new in ((want[0], model[0]), (want[2], model[2])):
        old.weight = nn.Parameter(new.to_weight().dequantize())
    torch.testing.assert_close(got, want(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_is_written_only_when_asked_for(progress, capsys):
    patch(llama(), progress=progress)
    out = capsys.readouterr()
    assert out.out == ""
    assert ("15/15 linears" in out.err) == (progress is True)
