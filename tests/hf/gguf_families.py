"""Tiny models of many families as GGUF files, by what llama.cpp's converter (its `conversion/`) does to each of them.

Written apart from the `GGUF` of families' files, for tests to hold the one against the other.
"""

import numpy as np
import torch
import transformers
from gguf_files import gguf, permuted

BASE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
BASE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
SPARSE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
ROUTED = {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 32, "n_shared_experts": 1}
ROUTED |= {"first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
GRANITE = {"attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.2, "logits_scaling": 8.0}
GRANITE_KEYS = {"attention.scale": 0.1, "embedding_scale": 12.0, "residual_scale": 0.2, "logit_scale": 8.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
EXPERTS_32 = {**EXPERTS, "expert_feed_forward_length": 32}
ROUTED_KEYS = {**EXPERTS_32, "expert_shared_count": 1, "leading_dense_block_count": 1}
ROUTED_KEYS |= {"expert_weights_norm": True, "expert_weights_scale": 1.5}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}
ERNIE |= {"moe_intermediate_size": 32, "moe_layer_interval": 1, "head_dim": 16}
ERNIE_KEYS = {**EXPERTS_32, "expert_shared_count": 1, "leading_dense_block_count": 1, "interleave_moe_layer_step": 1}

# model type, name of the architecture, fields of the config, metadata beyond those of all, whether q and k are permuted
FAMILIES = {
    "llama": ("llama", "llama", {}, {}, True),
    "llama of few heads": ("llama", "llama", {"head_dim": 32}, {"attention.key_length": 32}, True),
    "llama 3.1": ("llama", "llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}, {}, True),
    "llama, biases": ("llama", "llama", {"attention_bias": True}, {}, True),
    "mixtral": ("mixtral", "llama", {"num_local_experts": 4, "num_experts_per_tok": 2}, EXPERTS, True),
    "qwen2": ("qwen2", "qwen2", {}, {}, False),
    "qwen2, yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}, YARN_KEYS, False),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32}, {"attention.key_length": 32}, False),
    "qwen2_moe": (
        "qwen2_moe",
        "qwen2moe",
        {**SPARSE, "shared_expert_intermediate_size": 64},
        {**EXPERTS_32, "expert_shared_feed_forward_length": 64},
        False,
    ),
    "qwen3_moe": ("qwen3_moe", "qwen3moe", {**SPARSE, "norm_topk_prob": True, "head_dim": 16}, EXPERTS_32, False),
    "olmoe": ("olmoe", "olmoe", {**SPARSE, "num_key_value_heads": 4}, EXPERTS, False),
    "olmo2": ("olmo2", "olmo2", {}, {}, False),
    "olmo3": ("olmo3", "olmo2", {"sliding_window": 8}, {"attention.sliding_window": 8}, False),
    "granite": ("granite", "granite", GRANITE, GRANITE_KEYS, True),
    "granitemoe": (
        "granitemoe",
        "granitemoe",
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
        {**GRANITE_KEYS, **EXPERTS},
        True,
    ),
    "smollm3": ("smollm3", "smollm3", {}, {}, True),
    "glm4": ("glm4", "glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}, {"rope.dimension_count": 8}, False),
    "glm4_moe": (
        "glm4_moe",
        "glm4moe",
        {**ROUTED, "head_dim": 16, "partial_rotary_factor": 0.5},
        {**ROUTED_KEYS, "rope.dimension_count": 8},
        False,
    ),
    "dots1": ("dots1", "dots1", {**ROUTED, "head_dim": 16}, ROUTED_KEYS, False),
    "exaone4": (
        "exaone4",
        "exaone4",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]},
        False,
    ),
    "ernie4_5": ("ernie4_5", "ernie4_5", {"head_dim": 16}, {}, False),
    "ernie4_5_moe": ("ernie4_5_moe", "ernie4_5-moe", ERNIE, ERNIE_KEYS, False),
    "cohere": ("cohere", "command-r", {"logit_scale": 0.1}, {"logit_scale": 0.1, "rope.scaling.type": "none"}, False),
    "cohere2": (
        "cohere2",
        "cohere2",
        {"logit_scale": 0.1, "sliding_window": 8, "head_dim": 16},
        {"logit_scale": 0.1, "attention.sliding_window": 8},
        False,
    ),
    "phi": (
        "phi",
        "phi2",
        {"partial_rotary_factor": 0.5, "num_key_value_heads": 4},
        {"rope.dimension_count": 8},
        False,
    ),
    "gpt_neox": ("gpt_neox", "gptneox", {}, {"rope.dimension_count": 4, "use_parallel_residual": True}, False),
    "arcee": ("arcee", "arcee", {}, {}, True),
    "gemma": ("gemma", "gemma", {"head_dim": 16}, {}, False),
}


def float_model(name):
    """A model of the family whose norms and biases are not those of a new one."""
    model_type, _, fields, _, _ = FAMILIES[name]
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**{**BASE, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.05))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def write_family(path, name, model, kind="F32"):
    """The model's file; matrices but the embedding are blocks of a type."""
    _, architecture, _, extra, is_permuted = FAMILIES[name]
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    for key, value in {**_metadata(config), **extra}.items():
        _add(writer, f"{architecture}.{key}", value)
    for tensor, values in _tensors(model, architecture, is_permuted):
        is_matrix = values.ndim > 1 and "_inp" not in tensor and (config.tie_word_embeddings or "embd" not in tensor)
        number = getattr(gguf.GGMLQuantizationType, kind if is_matrix else "F32")
        raw = gguf.quants.quantize(np.ascontiguousarray(values), number)
        writer.add_tensor(tensor, raw, raw_dtype=number)
    if name == "llama 3.1":
        stock = model.model.rotary_emb.inv_freq
        plain = 5e5 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / stock).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config):
    rotation = getattr(config, "rope_parameters", None) or {}
    rotation = rotation.get("full_attention", rotation)
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "rope.freq_base": float(rotation.get("rope_theta", 1e4)),
    }
    for key, field in (("layer_norm_rms_epsilon", "rms_norm_eps"), ("layer_norm_epsilon", "layer_norm_eps")):
        if (value := getattr(config, field, None)) is not None:
            found[f"attention.{key}"] = value
    return found


def _add(writer, key, value):
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _tensors(model, architecture, is_permuted):
    """(name in the file, values) of every parameter, experts gathered, and buffers that files hold."""
    config = model.config
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            yield from _experts(key, tensor)
            continue
        place, _, suffix = key.rpartition(".")
        if suffix == "e_score_correction_bias":
            place, suffix = place.replace("gate.moe_statics", "moe_statics") + ".e_score_correction", "bias"
        found, values = names.get_name(place.replace("moe.router", "moe.gate")), tensor.numpy()
        if is_permuted and found.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if found.endswith("q") else config.num_key_value_heads
            values = permuted(values.reshape(len(values), -1), heads).reshape(values.shape)
        if architecture == "gptneox" and "query_key_value" in key:
            values = values.reshape(config.num_attention_heads, 3, -1).swapaxes(0, 1).reshape(values.shape)
        if architecture == "gemma" and "norm" in key:
            values = values + 1
        yield f"{found}.{suffix}", values.squeeze() if "inp_shexp" in found or suffix == "bias" else values


def _experts(key, tensor):
    layer = key.split(".")[2]
    if "down" in key:
        yield f"blk.{layer}.ffn_down_exps.weight", tensor.numpy()
        return
    for part, values in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
        yield f"blk.{layer}.ffn_{part}_exps.weight", values.numpy()
