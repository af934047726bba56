"""Tiny models as GGUF files, written by the package gguf: as one file or in parts, with a tokenizer or without."""

import numpy as np
import pytest
from chatting import TEMPLATE
from tokenizers import pre_tokenizers

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

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


# type: the places of d, and of dmin, in its blocks, and how large they are for weights of a tiny model
K_HALVES = {
    "Q4_K": ((0, 1e-4), (2, 6e-4)),
    "Q5_K": ((0, 5e-5), (2, 6e-4)),
    "Q6_K": ((208, 1e-5),),
    "Q3_K": ((108, 4e-4),),
    "IQ4_XS": ((0, 1e-5),),
    "Q2_K": ((80, 3e-3), (82, 6e-4)),
}


def random_k_blocks(values, number):
    """Blocks that gguf-py cannot quantize to: any codes, about as large as `values`."""
    generator = np.random.default_rng(values.size)
    per_block, size = gguf.GGML_QUANT_SIZES[number]
    raw = generator.integers(0, 256, (len(values), values.shape[1] // per_block, size), dtype=np.uint8)
    for at, typical in K_HALVES[number.name]:
        halves = (generator.random(raw.shape[:2]) * typical + typical / 4).astype(np.float16)
        raw[..., at : at + 2] = halves[..., None].view(np.uint8)
    return raw.reshape(len(values), -1)


def add_tokenizer(writer, vocabulary):
    """Bytes, one pair of them, the end, and a chat template; what is left of the vocabulary is unused."""
    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokens = alphabet + [f"<unused{i}>" for i in range(vocabulary - len(alphabet))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)


def write(path, model, kinds, head="Q8_0", *, tokenizer=False, part=0):
    """The model as a GGUF file; `kinds` are taken in turn by its linears. `part` is the number of tensors of a part."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=part)
    if tokenizer:
        add_tokenizer(writer, model.config.vocab_size)
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
        blocks = random_k_blocks if number.name in K_HALVES else gguf.quants.quantize
        raw = blocks(np.ascontiguousarray(values), number)
        writer.add_tensor(gguf_name(module), raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
