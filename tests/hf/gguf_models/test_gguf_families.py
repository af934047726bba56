"""Every family whose file says how GGUF keeps it: its files, as llama.cpp makes them, become that very model."""

import dataclasses
import importlib

import pytest
import torch
from tiny_models import int4s

import torch_int4
from torch_int4 import Int4Error
from torch_int4.patching import families

pytest.importorskip("gguf", reason="the package gguf is not installed")
from gguf_families import FAMILIES, float_model, write_family

from torch_int4.formats.gguf import dense
from torch_int4.formats.parts.gguf_file import open_gguf
from torch_int4.hf.gguf_blocks import NotServedError, load_direct

PROMPT = torch.arange(3, 23)[None]


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def test_every_family_with_a_layout_is_tried():
    known = {name for name in families.available() if families.extra(name, "GGUF") is not None}
    assert known == {model_type for model_type, *_ in FAMILIES.values()}


@pytest.mark.parametrize("name", FAMILIES)
def test_floats_become_the_very_model(name, tmp_path):
    want = float_model(name)
    path = write_family(tmp_path / "model.gguf", name, want)
    got, taken, _ = load_direct(path, open_gguf(path), torch.float32, None, head=True)
    assert type(got) is type(want)
    assert taken == []
    assert torch.equal(logits(got), logits(want))


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_taken_over_in_every_linear(name, tmp_path):
    model = float_model(name)
    path = write_family(tmp_path / "model.gguf", name, model, "Q8_0")
    file = open_gguf(path)
    got = torch_int4.from_pretrained(path, compute="fp32", kv_cache="fp32")
    assert got.torch_int4_report.notices == []
    assert not any("Q8_0" in reason for _, reason in got.torch_int4_report.skipped)
    blocks = [name for name, entry in file.tensors.items() if entry.kind == "Q8_0"]
    values = torch.cat([dense(file.read(n), "Q8_0", file.tensors[n].shape, n).flatten() for n in blocks])
    taken = torch.cat([module.dequantize().flatten() for module in int4s(got).values()])
    assert len(int4s(got)) >= len(blocks)  # experts lie together in a file
    assert torch.equal(values.sort().values, taken.sort().values)
    for key, module in int4s(got).items():
        torch.testing.assert_close(module.dequantize(), _weight(model, key), rtol=0.02, atol=0.01)


def _weight(model, key):
    """The float weight of a linear, which may lie in a tensor of all experts."""
    parts = key.split(".")
    if "experts" not in parts or parts[-2] == "shared_experts":
        return model.get_submodule(key).weight
    experts, number = model.get_submodule(".".join(parts[:-2])), int(parts[-2])
    if parts[-1] == "down_proj":
        return experts.down_proj[number]
    return experts.gate_up_proj[number].chunk(2)[parts[-1] == "up_proj"]


def test_a_tensor_without_a_place_is_said(tmp_path, monkeypatch):
    path = write_family(tmp_path / "model.gguf", "olmo2", float_model("olmo2"))
    family = importlib.import_module("torch_int4.patches.olmo2")
    other = dataclasses.replace(family.GGUF, names={"self_attn.q_proj": "attn_other"})
    monkeypatch.setattr(family, "GGUF", other)
    with pytest.raises(NotServedError, match=r"blk.0.attn_q.weight has no place in Olmo2ForCausalLM"):
        load_direct(path, open_gguf(path), torch.float32, None, head=True)
    with pytest.raises(Int4Error, match=r"model.gguf: .*attn_q.weight has no place"):
        torch_int4.from_pretrained(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.scaling.type", "longrope", r"rope.scaling.type 'longrope' is not read"),
        ("attention.head_count_kv", [2, 4], r"layers differ in attention.head_count_kv"),
    ],
)
def test_metadata_that_are_not_read_are_said(key, value, message, tmp_path, monkeypatch):
    kind, architecture, fields, extra, order = FAMILIES["olmo2"]
    monkeypatch.setitem(FAMILIES, "olmo2", (kind, architecture, fields, {**extra, key: value}, order))
    path = write_family(tmp_path / "model.gguf", "olmo2", float_model("olmo2"))
    with pytest.raises(Int4Error, match=message):
        torch_int4.from_pretrained(path)


def test_other_scaled_rotations_are_refused(tmp_path, monkeypatch):
    model = float_model("llama 3.1")
    model.model.rotary_emb.inv_freq[3] *= 1.5
    path = write_family(tmp_path / "model.gguf", "llama 3.1", model)
    with pytest.raises(Int4Error, match=r"rope_freqs.weight: scales rotations in another way"):
        torch_int4.from_pretrained(path)
