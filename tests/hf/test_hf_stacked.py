"""Checkpoints that hold all experts of a layer in one tensor are read expert by expert: floats, and gpt-oss' MXFP4."""

import json

import pytest
import torch
from decoders import assert_near, decoder, prompt
from safetensors.torch import load_file, save_file
from tiny_models import int4s, logits

import torch_int4
from torch_int4 import Int4Error, patch
from torch_int4.hf._stacked import StackedCheckpoint

FP4 = torch.ops.torch_int4.codebook("fp4")


def mx(weight):
    """Blocks and scales of values `[..., K]`, each rounded to the next of the sixteen, and what they stand for."""
    grouped = weight.unflatten(-1, (-1, 32))
    exponents = (grouped.abs().amax(-1) / 6).log2().ceil().clamp(-100, 100)
    codes = (grouped / exponents.exp2()[..., None]).unsqueeze(-1).sub(FP4).abs().argmin(-1).to(torch.uint8)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    values = (FP4[codes.long()] * exponents.exp2()[..., None]).flatten(-2)
    return blocks, (exponents + 127).to(torch.uint8), values


@pytest.fixture
def gpt_oss(tmp_path):
    """A folder with experts in MXFP4, and the float model of the values that these stand for."""
    model = decoder("gpt_oss")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(layer.mlp.experts, name)
            blocks, scales, values = mx(stack.detach().mT)
            stack.data = values.mT.contiguous()
            key = next(k for k in tensors if k.endswith(f"layers.{layer.self_attn.layer_idx}.mlp.experts.{name}"))
            del tensors[key]
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    save_file(tensors, file, {"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path, model


def test_mxfp4_experts_are_taken_over_as_they_are(gpt_oss, tmp_path):
    folder, want = gpt_oss
    loaded = torch_int4.from_pretrained(folder, compute="fp32", kv_cache="fp32")
    assert loaded.torch_int4_report.experts == len(want.model.layers)
    found = {name: linear for name, linear in int4s(loaded).items() if "experts" in name}
    assert len(found) == 2 * 4 * 3
    for name, linear in found.items():
        assert linear.weight_type == "fp4"
        layer, number, part = int(name.split(".")[2]), int(name.split(".")[-2]), name.split(".")[-1]
        experts = want.model.layers[layer].mlp.experts
        stack = experts.down_proj if part == "down_proj" else experts.gate_up_proj[..., part == "up_proj" :: 2]
        bias = experts.down_proj_bias if part == "down_proj" else experts.gate_up_proj_bias[..., part == "up_proj" :: 2]
        assert torch.equal(linear.dequantize(), stack[number].t())
        assert torch.equal(linear.bias, bias[number])
    assert_near(logits(loaded, prompt()), logits(want, prompt()), 2e-5)
    loaded.save_pretrained(tmp_path / "saved")
    again = torch_int4.from_pretrained(tmp_path / "saved", compute="fp32", kv_cache="fp32")
    assert torch.equal(logits(again, prompt()), logits(loaded, prompt()))


def test_a_missing_stack_is_named(gpt_oss):
    folder, _ = gpt_oss
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("gate_up_proj_scales"))
    del tensors[key]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(Int4Error, match=r"experts\.0\.gate_proj\.scales: is missing"):
        torch_int4.from_pretrained(folder)


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "mixtral"])
def test_float_stacks_are_read_one_expert_at_a_time(name, tmp_path, monkeypatch):
    """The bits are those of the model that is loaded whole and patched then."""
    model = decoder(name)
    model.save_pretrained(tmp_path, save_original_format=False)
    read = []
    stock = StackedCheckpoint.read
    monkeypatch.setattr(StackedCheckpoint, "read", lambda self, key, part=None: (read.append(key), stock(self, key))[1])
    loaded = torch_int4.from_pretrained(tmp_path)
    assert len([key for key in read if ".experts." in key and key.endswith(".weight")]) == 2 * 4 * 3
    want = patch(model)
    assert loaded.torch_int4_report.experts == want.torch_int4_report.experts == 2
    assert torch.equal(logits(loaded, prompt()), logits(want, prompt()))
