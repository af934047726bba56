"""A whole GGUF file, written by gguf-py: its blocks are taken over, whatever the order of their rows."""

import numpy as np
import pytest
import torch
from tiny_models import int4s, llama, logits

import torch_int4
from torch_int4 import Int4Error, patch
from torch_int4.formats.gguf import GgufBlocks

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from torch_int4.formats.parts.gguf_file import open_gguf  # noqa: E402
from torch_int4.hf.gguf import from_gguf, take_over  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tied": False}
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
NAMES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def gguf_name(module):
    if module in OTHERS:
        return OTHERS[module] + ".weight"
    _, _, layer, *_, leaf = module.split(".")
    return f"blk.{layer}.{ {**NAMES, **NORMS}[leaf] }.weight"


def permuted(weight, heads):
    """llama.cpp's order of the rows of q and k: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def random_k_blocks(values, number):
    """Blocks that gguf-py cannot quantize to: any codes, about as large as `values`."""
    generator = np.random.default_rng(values.size)
    per_block, size = gguf.GGML_QUANT_SIZES[number]
    raw = generator.integers(0, 256, (len(values), values.shape[1] // per_block, size), dtype=np.uint8)
    for at, typical in ((0, 1e-4), (2, 6e-4)):  # d and dmin
        halves = (generator.random(raw.shape[:2]) * typical + typical / 4).astype(np.float16)
        raw[..., at : at + 2] = halves[..., None].view(np.uint8)
    return raw.reshape(len(values), -1)


def write(path, model, kinds, head="Q8_0"):
    """The model as a GGUF file; `kinds` are taken in turn by its linears."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for index, (name, value) in enumerate(model.state_dict().items()):
        module, values = name.removesuffix(".weight"), value.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = permuted(values, heads)
        kind = "F32" if values.ndim == 1 or "embed" in name else kinds[index % len(kinds)]
        number = getattr(gguf.GGMLQuantizationType, head if name.startswith("lm_head") else kind)
        blocks = random_k_blocks if number == gguf.GGMLQuantizationType.Q4_K else gguf.quants.quantize
        raw = blocks(np.ascontiguousarray(values), number)
        writer.add_tensor(gguf_name(module), raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_blocks_are_taken_over_in_the_order_of_the_models_rows(tmp_path):
    path = write(tmp_path / "model.gguf", llama(**SIZES), ["Q4_0", "Q4_1", "Q8_0", "Q5_1"])
    model = from_gguf(path, compute="fp32", kv_cache="fp32")
    report = model.torch_int4_report
    assert len(report.linears) == 15  # with the head
    file = open_gguf(path)
    stored = {name: entry.kind for name, entry in file.tensors.items()}
    for name, module in int4s(model).items():
        assert module.weight_type == ("int4" if stored[gguf_name(name)] in ("Q4_0", "Q4_1") else "int8"), name
    from transformers import AutoModelForCausalLM, GgufConfig

    options = {"gguf_file": path.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    expanded = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    for name, module in int4s(model).items():
        assert torch.equal(module.dequantize(), expanded.get_submodule(name).weight), name
    torch.testing.assert_close(logits(model), logits(expanded), rtol=1e-4, atol=1e-4)


def test_what_lies_on_no_grid_is_quantized_by_the_recipe(tmp_path):
    path = write(tmp_path / "model.gguf", llama(**SIZES), ["F16", "Q4_0"], head="F32")
    model = from_gguf(path, group_size=64)
    sizes = {module.group_size for name, module in int4s(model).items() if name != "lm_head"}
    assert sizes == {32, 64}  # those of the file, and those of the config


@pytest.fixture
def k_quants(tmp_path):
    """A file of Q4_K, and transformers' expansion of it."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 96, "tied": False}
    path = write(tmp_path / "model-Q4_K.gguf", llama(**sizes), ["Q4_K"], head="Q4_K")
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
    for name, module in int4s(model).items():
        assert torch.equal(module.dequantize(), expanded.get_submodule(name).weight), name
    want = logits(expanded)
    assert (logits(model) - want).norm() <= 1e-5 * want.norm()


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


def test_a_float_head_stays(tmp_path):
    path = write(tmp_path / "model.gguf", llama(**SIZES), ["Q4_0"])
    model = torch_int4.from_pretrained(path, head="float")
    assert "lm_head" not in int4s(model)


def test_blocks_of_another_model_are_not_taken(tmp_path):
    path = write(tmp_path / "model.gguf", llama(**SIZES), ["Q4_0"])
    other = llama(**SIZES)
    assert take_over(other, open_gguf(path)) == []  # its weights were never rounded


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
