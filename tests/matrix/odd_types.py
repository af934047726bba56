"""Fields that tiny models of single types need, and the types that fail in transformers or cannot be built."""

TWO_WAYS = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}

_DSA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32}
_DSA |= {"swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "num_key_value_heads": 4}

_ADAPTER = {"adapter_in_dim": 64, "adapter_out_dim": 64, "adapter_input_size": 64}

_SHARED = {"layer_types": 2 * TWO_WAYS, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
_TWICE = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}

FIELDS = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": TWO_WAYS, "rope_parameters": dict.fromkeys(TWO_WAYS, ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "max_seq_len": 512},
    "dory": {
        "layer_types": 2 * TWO_WAYS,
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots3_note": {"text_config": _DSA, "vision_config": _ADAPTER, "audio_config": _ADAPTER},
    "dots3_note_text": _DSA,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {**_SHARED, "intermediate_size": 96},
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2},
    "got_ocr2": {"vision_config": {"output_channels": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 32}},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "hash_seed": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_TWICE, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {**_TWICE, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
FIELDS["qwen4_exp_text"] = _INDEXER
FIELDS["qwen4_exp"] = {"text_config": _INDEXER}

RAISE = {  # types whose `generate` with a cache raises an error in transformers, too
    "blt": AttributeError,
    "xlstm": ValueError,
}

NOT_BUILT = {  # types of which no tiny model can be built and run by itself, and why
    "gemma3n": "its vision tower needs timm and Pillow; `gemma3n_text` is the decoder in it",
    "gemma4_assistant": "a drafter, which reads the caches and hidden states of another model",
    "gemma4_unified_assistant": "a drafter, which reads the caches and hidden states of another model",
    "musicgen": "`AutoModelForCausalLM` does not build it from its config",
    "musicgen_melody": "`AutoModelForCausalLM` does not build it from its config",
}
