"""`patch` on models whose linears another backend has loaded. The backends are stood in for by modules that keep the
same tensors under the same names; where one installs, the last tests use it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from oracle import random_weight
from tiny_models import IDS, assert_same_model, int4s, llama, logits
from torch import nn

from torch_int4 import Int4Config, Int4Error, Int4Linear, formats, patch, recipes
from torch_int4.recipes import rtn

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tied": False}


def like(name, module, **fields):
    """A module whose class has that name, in a package of that name."""
    return type(name, (nn.Module,), {"__module__": module, **fields})()


def of_compressed_tensors(linear, weight):
    form = formats.get("compressed_tensors")
    module = nn.Linear(linear.in_features, linear.out_features, bias=False)
    del module.weight
    for key, value in form.write(weight, form.settings_for(weight), name="m").items():
        module.register_parameter(key, nn.Parameter(value, requires_grad=False))
    said = form.describe({"m": form.settings_for(weight)}, [])["config_groups"]["group_0"]["weights"]
    module.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(model_dump=lambda mode: said))
    return module


def of_gptq(linear, weight):
    form = formats.get("gptq")
    module = like("TorchLinear", "gptqmodel.nn_modules.qlinear.torch")
    for key, value in form.write(weight, form.settings_for(weight), name="m").items():
        module.register_buffer(key, value)
    module.bits, module.group_size = weight.bits, weight.group_size
    module.in_features, module.out_features = linear.in_features, linear.out_features
    module.register_buffer("bias", None if linear.bias is None else linear.bias.detach().half())
    return module


def of_awq(linear, weight):
    form = formats.get("awq")
    module = like("WQLinear_GEMM", "awq.modules.linear.gemm")
    for key, value in form.write(weight, form.settings_for(weight), name="m").items():
        module.register_buffer(key, value)
    module.group_size, module.in_features, module.out_features = 32, linear.in_features, linear.out_features
    return module


def of_auto_round(linear, weight):
    form = formats.get("gptq")
    module = like("QuantLinear", "auto_round_extension.torch.qlinear_torch_zp")
    for key, value in form.write(weight, form.settings_for(weight), name="m").items():
        module.register_buffer(key, value)
    module.bits, module.group_size = 4, 32
    return module


def of_hqq(linear, weight):
    module = like("HQQLinear", "hqq.core.quantize")
    groups = weight.codes.reshape(-1, 32)
    half = groups.shape[0] // 2
    module.W_q = nn.Parameter(groups[:half] * 16 + groups[half:], requires_grad=False)
    zeros = torch.full_like(weight.scales, 8) if weight.zeros is None else weight.zeros
    module.meta = {"nbits": 4, "axis": 1, "group_size": 32, "packing": "4bit_u8", "shape": tuple(weight.codes.shape)}
    module.meta |= {"scale": weight.scales.reshape(-1, 1), "zero": zeros.to(weight.scales.dtype).reshape(-1, 1)}
    return module


BACKENDS = {f.__name__.removeprefix("of_"): f for f in (of_compressed_tensors, of_gptq, of_awq, of_auto_round, of_hqq)}


def loaded_by(backend, kind="integer", order=False):
    """A model whose linears, but for the head, are of that backend, and the weights that they stand for."""
    model, weights = llama(**SIZES), {}
    for index, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = random_weight(module.out_features, module.in_features, 32, kind, seed=index)
            if order:
                weight.perm = torch.randperm(module.in_features)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, BACKENDS[backend](module, weight))
            weights[name] = weight.dequantize()
    return model, weights


@pytest.mark.parametrize("kind", ["symmetric", "integer"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_linear_is_taken_over_as_it_is(backend, kind):
    model, weights = loaded_by(backend, kind)
    patched = patch(model, head="float", compute="fp32", kv_cache="fp32")
    assert set(int4s(patched)) == set(weights)
    for name, module in int4s(patched).items():
        torch.testing.assert_close(module.dequantize(), weights[name], rtol=1e-5, atol=1e-6)
    reference = llama(**SIZES)
    for name, weight in weights.items():
        reference.get_submodule(name).weight.data = weight
    torch.testing.assert_close(logits(patched), logits(reference), rtol=1e-3, atol=1e-3)
    report = patched.torch_int4_report
    assert len(report.linears) == len(weights)
    assert all(entry.bytes_before < 4 * entry.weights for entry in report.linears)
    assert patch(patched, Int4Config(head="float", compute="fp32", kv_cache="fp32")) is patched


def test_act_order_and_the_head_that_is_still_a_float():
    model, weights = loaded_by("gptq", order=True)
    patched = patch(model, compute="fp32")
    linears = int4s(patched)
    assert linears["lm_head"].weight_type == "int8"
    for name, weight in weights.items():
        assert torch.equal(linears[name].dequantize(), weight)
        assert linears[name].perm is not None


def test_what_is_skipped_stays_with_its_backend():
    model, weights = loaded_by("compressed_tensors")
    patched = patch(model, skip=("*.down_proj",))
    left = {name for name in weights if name.endswith("down_proj")}
    assert left
    assert all(not isinstance(patched.get_submodule(name), Int4Linear) for name in left)
    assert set(int4s(patched)) == set(weights) - left | {"lm_head"}


def test_hooks_and_biases_move_along():
    model, _ = loaded_by("gptq")
    module = model.model.layers[0].self_attn.o_proj
    module.bias = torch.linspace(-1, 1, 64).half()
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    patched = patch(model, attention="stock")
    logits(patched)
    assert seen
    assert torch.equal(patched.model.layers[0].self_attn.o_proj.bias.half(), torch.linspace(-1, 1, 64).half())


def test_what_transformers_remembers_of_the_backend_is_dropped():
    model, _ = loaded_by("awq")
    model.hf_quantizer, model.is_quantized = object(), True
    model.config.quantization_config = {"quant_method": "awq"}
    patched = patch(model)
    assert getattr(patched, "hf_quantizer", None) is None
    assert not patched.is_quantized or "torch_int4" in str(patched.config.quantization_config)
    assert "awq" not in str(getattr(patched.config, "quantization_config", ""))


def test_the_hook_that_would_expand_every_weight_is_taken_away():
    model, _ = loaded_by("compressed_tensors")

    def expand(*_):
        raise AssertionError("called")

    model.ct_decompress_hook = model.register_forward_pre_hook(expand)
    patched = patch(model)
    assert not patched._forward_pre_hooks
    assert logits(patched).isfinite().all()


DAMAGE = {
    "holds NaN": lambda m: m.scales.fill_(float("nan")),
    "must have shape": lambda m: setattr(m, "qzeros", m.qzeros[:1]),
    "bits=3": lambda m: setattr(m, "bits", 3),
    "on the meta device": lambda m: setattr(m, "qweight", m.qweight.to("meta")),
    "the group index holds": lambda m: m.g_idx.add_(100),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_names_the_module_and_leaves_the_model_as_it_was(message):
    model, _ = loaded_by("gptq")
    first = model.model.layers[0].self_attn.q_proj
    DAMAGE[message](first)
    with pytest.raises(Int4Error) as caught:
        patch(model)
    assert str(caught.value).startswith(
        "model.layers.0.self_attn.q_proj: taking it over from its backend failed at once"
    )
    assert message in str(caught.value)
    assert model.model.layers[0].self_attn.q_proj is first
    assert not int4s(model)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0", "Q2_K"])
def test_linears_of_gguf_files(kind):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    number = getattr(gguf.GGMLQuantizationType, kind)
    per_block, size = gguf.GGML_QUANT_SIZES[number]
    model = nn.Sequential(utils.GgufLinear(256, 6, int(number)))
    raw = torch.randint(0, 256, (6, 256 // per_block, size), dtype=torch.uint8)
    where = {"Q4_K": [0, 2], "Q6_K": [208], "Q8_0": [0], "Q2_K": [80, 82]}[kind]
    for at in where:
        raw[..., at : at + 2] = torch.rand(6, 256 // per_block, 1).half().view(torch.uint8)
    model[0].weight.data = raw.view(6, -1)
    want = formats.dense_module(model[0], name="0")
    exact = formats.convert_module(model[0], name="0")
    patch(model)
    if kind == "Q2_K":  # on no grid: rounded by the recipe
        assert exact is None
        assert torch.equal(model[0].to_weight().codes, rtn.quantize(want, Int4Config()).codes)
    else:
        assert torch.equal(model[0].dequantize(), want)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_model_that_transformers_loads_through_bitsandbytes(tmp_path, kind):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama(**SIZES).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    expected = {n: formats.dense_module(m, name=n) for n, m in model.named_modules() if formats.holds(m)}
    assert len(expected) == 14
    patched = patch(model, compute="fp32", head="float", kv_cache="fp32")
    for name, weight in expected.items():
        module = patched.get_submodule(name)
        assert module.weight_type == {"nf4": "nf4", "fp4": "bnb_fp4"}[kind]
        torch.testing.assert_close(module.dequantize(), weight, rtol=1e-6, atol=1e-7)
    assert patched(input_ids=IDS).logits.isfinite().all()
    reference = llama(**SIZES)
    assert_same_model(reference, patched, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("toy_stages")
def test_models_of_other_backends_cannot_be_prepared():
    model = llama(**SIZES)
    weight = rtn.quantize(model.model.layers[0].mlp.up_proj.weight, Int4Config())
    model.model.layers[0].mlp.up_proj = of_gptq(model.model.layers[0].mlp.up_proj, weight)
    before = copy.deepcopy(model.state_dict())
    recipes.get("toy_shuffle").CALLS.clear()
    with pytest.raises(Int4Error, match=r"up_proj: is quantized already, and .*changes the float model as a whole"):
        patch(model, recipe="toy_shuffle+rtn")
    assert recipes.get("toy_shuffle").CALLS == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
