"""A whole GGUF file, written by gguf-py: its blocks are taken over, whatever the order of their rows."""

import pytest
import torch
from tiny_models import int4s, llama, logits

import torch_int4
from torch_int4 import Int4Error, Int4Weight, patch
from torch_int4.formats.gguf import GgufBlocks
from torch_int4.nn.prepared import layers

pytest.importorskip("gguf", reason="the package gguf is not installed")
from gguf_files import SIZES, gguf_name, write

from torch_int4.formats.parts.gguf_file import open_gguf
from torch_int4.hf import gguf
from torch_int4.hf.gguf import from_gguf, take_over


def refuse(*args, **kwargs):
    raise gguf.NotServedError("as the test wants it")


def test_blocks_are_taken_over_in_the_order_of_the_models_rows(tmp_path):
    path = write(tmp_path / "model.gguf", llama(**SIZES), ["Q4_0", "Q4_1", "Q8_0", "Q5_1"])
    model = from_gguf(path, compute="fp32", kv_cache="fp32")
    report = model.torch_int4_report
    assert len(report.linears) == 15  # with the head
    file = open_gguf(path)
    stored = {name: entry.kind for name, entry in file.tensors.items()}
    for name, module in int4s(model).items():
        assert module.weight_type == {"Q5_1": "int5", "Q8_0": "int8"}.get(stored[gguf_name(name)], "int4"), name
    from transformers import AutoModelForCausalLM, GgufConfig

    options = {"gguf_file": path.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    expanded = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    for name, module in int4s(model).items():
        assert torch.equal(module.dequantize(), expanded.get_submodule(name).weight), name
    torch.testing.assert_close(logits(model), logits(expanded), rtol=1e-4, atol=1e-4)


K_SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 96, "tied": False}


def test_what_lies_on_no_grid_is_quantized_by_the_recipe(tmp_path):
    path = write(tmp_path / "model.gguf", llama(**K_SIZES), ["Q2_K", "Q4_0"], head="F32")
    model = from_gguf(path, group_size=64)
    sizes = {module.group_size for name, module in int4s(model).items() if name != "lm_head"}
    assert sizes == {32, 64}  # those of the file, and those of the config
    rounded = {name for name, module in int4s(model).items() if module.group_size == 64}
    (notice,) = model.torch_int4_report.notices
    assert "(F32, Q2_K): " in notice
    assert set(notice.partition("): ")[2].split(", ")) == rounded | {"lm_head"}
    assert notice in str(model.torch_int4_report)


@pytest.mark.parametrize("direct", [True, False])
def test_floats_among_blocks_stay_what_they_are(direct, tmp_path, monkeypatch):
    if not direct:
        monkeypatch.setattr(gguf, "load_direct", refuse)
    stock = llama(**SIZES)
    path = write(tmp_path / "model.gguf", stock, ["BF16", "Q8_0", "F16"])
    model = from_gguf(path, compute="fp32", kv_cache="fp32")
    stored = {name: entry.kind for name, entry in open_gguf(path).tensors.items()}
    left = {name for name, _ in model.torch_int4_report.skipped}
    assert left == {name for name in int4s(patch(llama(**SIZES))) if stored[gguf_name(name)] in ("BF16", "F16")}
    for name in left:
        weight = stock.get_submodule(name).weight
        kept = weight.bfloat16() if stored[gguf_name(name)] == "BF16" else weight.half()
        assert torch.equal(model.get_submodule(name).weight, kept.float()), name


@pytest.fixture
def k_quants(tmp_path):
    """A file of Q4_K, and transformers' expansion of it."""
    path = write(tmp_path / "model-Q4_K.gguf", llama(**K_SIZES), ["Q4_K"], head="Q4_K")
    from transformers import AutoModelForCausalLM, GgufConfig

    options = {"gguf_file": path.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    return path, AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()


def test_k_quants_are_as_small_as_in_the_file_and_as_exact(k_quants, tmp_path):
    path, expanded = k_quants
    model = torch_int4.from_pretrained(path, compute="fp32", kv_cache="fp32")
    stored = {name: entry for name, entry in open_gguf(path).tensors.items() if entry.kind == "Q4_K"}
    assert len(stored) == len(int4s(model)) == 15
    nbytes = sum(entry.end - entry.begin for entry in stored.values())
    assert sum(module.nbytes for module in int4s(model).values()) == nbytes * 4.625 / 4.5
    assert model.torch_int4_report.bits_per_weight() < 4.5 * 1.05
    assert model.torch_int4_report.notices == []
    for name, module in int4s(model).items():
        assert torch.equal(module.dequantize(), expanded.get_submodule(name).weight), name
    want = logits(expanded)
    assert (logits(model) - want).norm() <= 1e-5 * want.norm()


def test_fused_layers_decode_k_quants_with_the_bits_of_scales_of_one_level(k_quants):
    model = torch_int4.from_pretrained(k_quants[0])
    assert model.torch_int4_report.blocks == 2
    prompt = torch.arange(3, 12)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got = model.generate(prompt, **options)
    for module in int4s(model).values():
        weight = module.to_weight()
        assert weight.multipliers is not None
        scales, offsets = weight.group_scales(), weight.group_offsets()
        module.set_weight(Int4Weight(weight.codes, scales, offsets=offsets, perm=weight.perm))
    want = model.generate(prompt, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert all(map(torch.equal, got.logits, want.logits))


@pytest.mark.filterwarnings("ignore:.*saved in torch_int4's own form")
def test_k_quants_are_saved_and_loaded_as_they_are(k_quants, tmp_path):
    model = torch_int4.from_pretrained(k_quants[0])
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    again = torch_int4.from_pretrained(folder)
    assert again.torch_int4_report.bits_per_weight() == model.torch_int4_report.bits_per_weight()
    for name, module in int4s(model).items():
        other = int4s(again)[name]
        assert all(torch.equal(getattr(other, field), getattr(module, field)) for field in ("packed", "packed_scales"))
        assert other.packed_offsets is None
        assert module.packed_weight.offset_kind == "float"
    assert torch.equal(logits(again), logits(model))


MIXES = {
    "Q4_K_M": (["Q4_K", "Q4_K", "Q6_K"], "Q6_K"),
    "Q5_K_M": (["Q5_K", "Q6_K"], "Q6_K"),
    "Q3_K_M": (["Q3_K", "Q4_K", "Q5_K"], "Q6_K"),
    "IQ4_XS": (["IQ4_XS", "Q5_K"], "Q6_K"),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.filterwarnings("ignore:.*saved in torch_int4's own form")
def test_mixed_files_run_in_fused_layers_and_are_saved_as_they_are(mix, tmp_path):
    """llama.cpp's file types give the tensors of a layer several types of blocks."""
    kinds, head = MIXES[mix]
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 96, "tied": False}
    path = write(tmp_path / f"model-{mix}.gguf", llama(**sizes), kinds, head=head)
    from transformers import AutoModelForCausalLM, GgufConfig

    options = {"gguf_file": path.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    expanded = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    model = torch_int4.from_pretrained(path, compute="fp32", kv_cache="fp32")
    report = model.torch_int4_report
    assert (report.notices, report.blocks, report.merged) == ([], 2, 4)
    for name, module in int4s(model).items():
        assert torch.equal(module.dequantize(), expanded.get_submodule(name).weight), name
    want = logits(expanded)
    assert (logits(model) - want).norm() <= 1e-5 * want.norm()
    prompt, how = torch.arange(3, 12)[None], {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **how), expanded.generate(prompt, **how))
    assert all(layers[layer].is_whole for layer in model.model.layers)
    model.save_pretrained(tmp_path / "saved")
    again = torch_int4.from_pretrained(tmp_path / "saved", compute="fp32", kv_cache="fp32")
    assert torch.equal(logits(again), logits(model))
    assert again.torch_int4_report.bits_per_weight() == report.bits_per_weight()


@pytest.mark.parametrize("name", [None, "LlamaForCausalLM", "AutoModelForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_direct_way_gives_the_model_that_transformers_expands(name, dtype, tied, tmp_path, monkeypatch):
    import transformers

    float_model = llama(**{**SIZES, "tied": tied})
    if tied:
        float_model.lm_head = None  # a file has the matrix once
    path = write(tmp_path / "model.gguf", float_model, ["Q4_0", "Q8_0", "F16"])
    kind = None if name is None else getattr(transformers, name)
    options = {"model_class": kind, "dtype": dtype, "kv_cache": "fp32"}
    with monkeypatch.context() as patched:
        patched.setattr(gguf, "load_direct", refuse)
        want = from_gguf(path, **options)
    monkeypatch.setattr(gguf, "_expand", None)  # no weight is expanded as a whole
    got = from_gguf(path, **options)
    assert type(got) is type(want)
    assert got.torch_int4_report.notices == want.torch_int4_report.notices
    for (key, a), (other, b) in zip(got.state_dict().items(), want.state_dict().items(), strict=True):
        assert key == other
        assert a.dtype == b.dtype, key
        assert torch.equal(a, b), key
    assert torch.equal(logits(got), logits(want))
    assert got.config.to_diff_dict() == want.config.to_diff_dict()
    assert got.generation_config.to_diff_dict() == want.generation_config.to_diff_dict()


def test_a_float_head_stays(tmp_path):
    path = write(tmp_path / "model.gguf", llama(**SIZES), ["Q4_0"])
    model = torch_int4.from_pretrained(path, head="float")
    assert "lm_head" not in int4s(model)


def test_blocks_of_another_model_are_not_taken(tmp_path):
    path = write(tmp_path / "model.gguf", llama(**SIZES), ["Q4_0"])
    other = llama(**SIZES)
    assert take_over(other, open_gguf(path)) == ([], [])  # its weights were never rounded


def test_blocks_compute_without_a_patch(tmp_path):
    path = write(tmp_path / "model.gguf", llama(**SIZES), ["Q4_0"])
    file = open_gguf(path)
    entry = file.tensors["blk.0.attn_v.weight"]
    module = GgufBlocks(file.read("blk.0.attn_v.weight"), entry.kind, entry.shape)
    x = torch.randn(3, entry.shape[1])
    before = module(x)
    holder = patch(torch.nn.Sequential(module), compute="fp32")
    torch.testing.assert_close(holder(x), before, rtol=1e-5, atol=1e-5)


def test_damage_is_named_before_transformers_sees_the_file(tmp_path):
    path = write(tmp_path / "model.gguf", llama(**SIZES), ["Q4_0"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Int4Error, match=r"model\.gguf: .*do not lie in the file"):
        from_gguf(path)
