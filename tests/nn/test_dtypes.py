"""Other dtypes for a patched model, and linears that a model keeps in fp32."""

import copy

import pytest
import torch
from decoders import decoder
from tiny_models import IDS, int4s, llama, logits
from transformers import T5Config, T5ForConditionalGeneration

import torch_int4
from torch_int4 import Int4Linear, patch
from torch_int4.nn.linear import Fp32Linear

CLOSE = {torch.float64: 1e-5, torch.float32: 0.0, torch.float16: 0.01, torch.bfloat16: 0.06}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2_moe", "qwen3_next"])
def test_a_patched_model_goes_to_another_dtype(name, dtype):
    model = patch(decoder(name), compute="fp32", kv_cache="fp32")
    want = logits(model)
    got = logits(copy.deepcopy(model).to(dtype))
    assert got.dtype == dtype
    assert (got - want).double().norm() <= CLOSE[dtype] * want.double().norm()
    moved = copy.deepcopy(model).to(dtype)
    assert all(linear.compute_dtype == dtype for linear in int4s(moved).values())
    tokens = moved.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 10)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(tokens, model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_double_keeps_biases_and_gradients():
    model = patch(llama(attention_bias=True, dtype=torch.float64).float(), compute="fp32").double()
    linear = model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(linear.bias)
    x = torch.randn(3, 72, dtype=torch.float64, requires_grad=True)
    y = linear(x)
    torch.testing.assert_close(y, x @ linear.dequantize(torch.float64).t() + linear.bias, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, linear.dequantize(torch.float64).sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def t5(folder):
    torch.manual_seed(0)
    config = T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", ["patch", "load", "again"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_model_class_keeps_in_fp32_stays_there(way, dtype, tmp_path):
    stock = T5ForConditionalGeneration.from_pretrained(t5(tmp_path / "float"), dtype=dtype).eval()
    kept = {n for n, m in stock.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.dtype != dtype}
    assert bool(kept) == (dtype == torch.float16)  # bf16 has fp32's range
    if way == "patch":
        model = patch(copy.deepcopy(stock))
    else:
        model = torch_int4.from_pretrained(tmp_path / "float", model_class=T5ForConditionalGeneration, dtype=dtype)
    if way == "again":
        model.save_pretrained(tmp_path / "int4")
        model = torch_int4.from_pretrained(tmp_path / "int4", model_class=T5ForConditionalGeneration, dtype=dtype)
    seen = {}
    for name, module in int4s(model).items():
        module.register_forward_hook(lambda module, x, y, name=name: seen.update({name: (y.dtype, module.compute)}))
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert {name for name, how in seen.items() if how == (torch.float32, "fp32")} == kept
    assert all(seen[name] == (dtype, "int8") for name in seen.keys() - kept)
    assert sum("its model keeps it in fp32" in line for line in str(model.torch_int4_report).splitlines()) == len(kept)
    assert all(isinstance(model.get_submodule(name), Fp32Linear) for name in kept)


def test_a_wide_output_does_not_overflow():
    linear = torch.nn.Linear(64, 32, bias=False)
    torch.nn.init.constant_(linear.weight, 100.0)
    made = Int4Linear.from_weight(
        torch_int4.recipes.get("rtn").quantize(
            linear.weight.detach(), torch_int4.Int4Config().weights, bits=4, name="x"
        ),
        compute="fp32",
    )
    made.__class__ = Fp32Linear
    assert made(torch.full((1, 64), 60.0, dtype=torch.float16)).isfinite().all()
