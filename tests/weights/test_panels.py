"""Panels in files: bit-identical, aligned, shared, remade when anything changes, refused when damaged; offload."""

import copy
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from oracle import random_weight
from safetensors import safe_open
from tiny_models import int4s, llama, logits

import torch_int4
from torch_int4 import Int4Error, Int4Linear, patch
from torch_int4.recipes import rtn
from torch_int4.weights import panel_files as panels
from torch_int4.weights.packed import FIELDS

FULL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
KINDS = [
    {"kind": "symmetric"},
    {"kind": "integer"},
    {"kind": "float"},
    {"codebook": "nf4"},
    {"kind": "symmetric", "bits": 8},
]


def linears():
    made = {}
    for i, fields in enumerate(KINDS):
        made[f"läyer.{i}"] = Int4Linear.from_weight(random_weight(17 + i, 72, 32, **fields), dtype=torch.bfloat16)
    ordered = random_weight(5, 33, 32, "integer")
    ordered.perm = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    made["ordered"] = Int4Linear.from_weight(ordered)
    made["records"] = Int4Linear.from_weight(random_weight(19, 512, 32, "records"), dtype=torch.bfloat16)
    return made


def held(weights):
    """Linears of mapped weights, for activations in the type that those of `linears` are for."""
    dtypes = {name: torch.float32 if name == "ordered" else torch.bfloat16 for name in weights}
    return {name: Int4Linear(weight, dtype=dtypes[name]) for name, weight in weights.items()}


def written(folder, name="x.safetensors"):
    made = linears()
    writer = panels.PanelWriter(folder, name, made)
    for key, linear in made.items():
        writer.add(key, linear.packed_weight)
    return made, held(writer.finish())


def assert_same(made, mapped):
    assert list(made) == list(mapped)
    for name, linear in made.items():
        other = mapped[name]
        x = torch.randn(3, linear.in_features)
        assert torch.equal(linear(x), other(x))
        assert (linear.compute_dtype, linear.weight_type) == (other.compute_dtype, other.weight_type)
        assert linear.extra_repr() == other.extra_repr()
        a, b = linear.to_weight(), other.to_weight()
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.dequantize(), b.dequantize())


def test_every_kind_of_weight_is_mapped_bit_by_bit(tmp_path):
    made, mapped = written(tmp_path / "new")
    assert_same(made, mapped)
    assert_same(made, held(panels.map_file(tmp_path / "new" / "x.safetensors")))
    assert os.listdir(tmp_path / "new") == ["x.safetensors"]


def test_the_file_is_safetensors_with_aligned_tensors(tmp_path):
    made, mapped = written(tmp_path)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        keys = {key for key in file.keys() if not key.startswith(".")}  # noqa: SIM118
        assert torch.equal(file.get_tensor("ordered.packed"), made["ordered"].packed)
    assert keys == {f"{n}.{f}" for n, m in made.items() for f in FIELDS if getattr(m, f) is not None}
    for module in mapped.values():
        assert module.packed.data_ptr() % 64 == 0
        assert module.packed_scales.data_ptr() % 64 == 0


def test_a_file_without_a_name_lives_as_long_as_its_mapping(tmp_path):
    made, mapped = written(tmp_path, None)
    assert os.listdir(tmp_path) == []
    assert_same(made, mapped)
    assert_same(made, copy.deepcopy(mapped))


def test_writing_to_a_mapped_weight_does_not_reach_the_file(tmp_path):
    made, mapped = written(tmp_path)
    mapped["ordered"].packed.fill_(7)
    assert_same(made, held(panels.map_file(tmp_path / "x.safetensors")))


def test_an_unfinished_file_leaves_nothing(tmp_path):
    writer = panels.PanelWriter(tmp_path, "x", ["a"])
    writer.add("a", linears()["ordered"].packed_weight)
    writer.discard()
    assert os.listdir(tmp_path) == []


def damaged(path, how):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if how == "cut":
        return data[:-70]
    if how == "empty":
        return b""
    if how == "text":
        return b"<html>not found</html>" * 20
    if how == "layout":
        header["__metadata__"]["format"] = "torch_int4 panels P16 0"
    if how == "rows":
        header["__metadata__"]["linears"] = header["__metadata__"]["linears"].replace(
            '"out_features": 5', '"out_features": 50'
        )
    if how == "gone":
        del header["__metadata__"]["linears"]
    if how == "dtype":
        entry = header["ordered.packed_scales"]
        entry["dtype"], entry["shape"] = "U8", [entry["data_offsets"][1] - entry["data_offsets"][0]]
    return struct.pack("<Q", size) + json.dumps(header).encode().ljust(size) + data[8 + size :]


@pytest.mark.parametrize("how", ["cut", "empty", "text", "layout", "rows", "gone", "dtype"])
def test_a_damaged_file_is_an_error_that_names_it(how, tmp_path):
    written(tmp_path)
    path = tmp_path / "x.safetensors"
    path.write_bytes(damaged(path, how))
    with pytest.raises(Int4Error, match=r"x\.safetensors: cannot be mapped .*made again"):
        panels.map_file(path)
    with pytest.raises(Int4Error, match="absent"):
        panels.map_file(tmp_path / "absent")


@pytest.mark.parametrize(("value", "want"), [(None, None), ("", None), ("0", None), ("1", "cache"), ("~/x", "home")])
def test_the_variable_says_where(value, want, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(panels.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(panels.VARIABLE, value)
    wanted = {None: None, "cache": tmp_path / "torch_int4" / "panels", "home": Path.home() / "x"}[want]
    assert panels.cache_folder() == wanted


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "panels"
    monkeypatch.setenv(panels.VARIABLE, str(folder))
    return folder


def files(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def load(folder, monkeypatch=None, **options):
    """The model, and the linears that were quantized for it."""
    quantize, seen = rtn.quantize, []

    def watching(weight, config, *, name, **rest):
        seen.append(name)
        return quantize(weight, config, name=name, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(rtn, "quantize", watching)
        return torch_int4.from_pretrained(folder, **options), seen


def test_the_second_start_quantizes_nothing_and_has_the_same_bits(cache, tmp_path, monkeypatch):
    llama(tied=False, attention_bias=True, **FULL).save_pretrained(tmp_path / "m")
    first, seen = load(tmp_path / "m", monkeypatch)
    assert len(seen) == 15
    second, seen = load(tmp_path / "m", monkeypatch)
    assert seen == []
    assert torch.equal(logits(first), logits(second))
    assert torch.equal(logits(first), logits(patch(llama(tied=False, attention_bias=True, **FULL))))
    assert str(first.torch_int4_report) == str(second.torch_int4_report)
    assert len(files(cache)) == 1
    other, seen = load(tmp_path / "m", monkeypatch, compute="int8x2", kv_cache="fp32")  # the same panels serve
    assert seen == []
    assert {module.compute for module in int4s(other).values()} == {"int8x2"}


def test_anything_that_changes_the_bits_makes_new_panels(cache, tmp_path, monkeypatch):
    model = llama(tied=False, **FULL)
    model.save_pretrained(tmp_path / "m")
    load(tmp_path / "m", monkeypatch)
    for count, options in enumerate([{"group_size": 64}, {"symmetric": False}, {"clip": True}, {"head": "int4"}]):
        assert load(tmp_path / "m", monkeypatch, **options)[1] != []
        assert len(files(cache)) == count + 2
    status = os.stat(tmp_path / "m" / "model.safetensors")
    model.model.layers[0].mlp.up_proj.weight.data.neg_()
    model.save_pretrained(tmp_path / "m")
    os.utime(tmp_path / "m" / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    changed, seen = load(tmp_path / "m", monkeypatch)
    assert len(seen) == 15
    assert torch.equal(logits(changed), logits(patch(model)))


def test_a_copy_of_the_checkpoint_is_recognised_by_its_contents(cache, tmp_path, monkeypatch):
    model = llama(tied=False, **FULL)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        load(tmp_path / name, monkeypatch)
    assert len(files(cache)) == 1


def test_quantized_checkpoints_have_panels_too(cache, tmp_path, monkeypatch):
    want = patch(llama(tied=False, **FULL))
    want.save_pretrained(tmp_path / "m")
    for _ in range(2):
        assert torch.equal(logits(want), logits(load(tmp_path / "m", monkeypatch)[0]))
    assert len(files(cache)) == 1


def test_damaged_panels_are_made_again(cache, tmp_path, monkeypatch):
    llama(tied=False, **FULL).save_pretrained(tmp_path / "m")
    first, _ = load(tmp_path / "m", monkeypatch)
    path = cache / files(cache)[0]
    data = path.read_bytes()
    path.unlink()  # the first model has it mapped
    path.write_bytes(data[:-100])
    second, seen = load(tmp_path / "m", monkeypatch)
    assert len(seen) == 15
    assert torch.equal(logits(first), logits(second))
    assert load(tmp_path / "m", monkeypatch)[1] == []


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(tmp_path, monkeypatch):
    llama(tied=False, **FULL).save_pretrained(tmp_path / "m")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(panels.VARIABLE, str(tmp_path / "file" / "x"))
    with pytest.raises(Int4Error, match=r"file.x: .*TORCH_INT4_PANELS"):
        load(tmp_path / "m", monkeypatch)
