"""Tiny configs of every decoder type that transformers has, made from the fields of their config classes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from odd_types import FIELDS
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES: dict[str, Any] = {}  # field: what a tiny model has in its place


def _put(size: int, names: str) -> None:
    SIZES.update(dict.fromkeys(names.split(), size))


_put(128, "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size unpadded_vocab_size")
_put(128, "pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base encoder_hash_byte_group_vocab")
_put(64, "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size")
_put(64, "word_embed_proj_dim backbone_hidden_size hidden_size_global input_size lru_width")
_put(96, "intermediate_size ffn_dim ffn_hidden_size n_inner d_inner dff dim_ff feed_forward_size mlp_dim")
_put(96, "encoder_ffn_dim decoder_ffn_dim dense_intermediate_size intermediate_size_mlp block_dim block_ff_dim")
_put(32, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size")
_put(32, "shared_experts_intermediate_size moe_shared_expert_intermediate_size hidden_size_per_layer_input")
_put(32, "pronunciation_embed_dim shape_embed_dim ple_embed_dim router_hidden_size")
_put(32, "q_lora_rank kv_lora_rank o_lora_rank hc_lowrank")
_put(4, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads")
_put(4, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_attention_heads")
_put(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads kv_n_heads global_num_key_value_heads")
_put(2, "num_query_groups index_n_heads n_groups mamba_n_groups mamba_ngroups")
_put(8, "mamba_num_heads mamba_n_heads n_mamba_heads linear_num_heads")
_put(16, "head_dim d_head dim_head attention_head_size kv_channels swa_head_dim v_head_dim qk_nope_head_dim d_kv")
_put(16, "qk_rope_head_dim index_head_dim global_head_dim linear_key_head_dim linear_value_head_dim")
_put(16, "linear_head_dim mamba_head_dim mamba_headdim mamba_d_head")
_put(16, "state_size ssm_state_size mamba_d_state time_step_rank mamba_dt_rank")
_put(2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers")
_put(2, "num_decoder_layers num_blocks depth")
_put(4, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts")
_put(2, "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts")
_put(
    1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers"
)
_put(8, "sliding_window attention_window_size window_size sliding_window_size rotary_dim index_topk")
_put(512, "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions max_source_positions")
_put(512, "original_max_position_embeddings model_max_length context_length")

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")  # lists of kinds, one a layer
MOST_KINDS = 4
IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
MOST_PARAMETERS = 1_500_000


def tiny_config(model_type: str) -> Any:
    """A config with one layer of each kind that the type's own default has, two at least."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_shrunk(kind, FIELDS.get(model_type, {})))


def tiny_model(model_type: str) -> nn.Module:
    """A float model of a type in which every parameter matters, as `AutoModelForCausalLM` builds it."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    assert parameters < MOST_PARAMETERS, f"{model_type} is not tiny: say in odd_types.py which of its fields are sizes"
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval().float()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def _shrunk(kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a config class: `fields`, and small numbers for the others; of its parts by their names."""
    known = {name: value for name, value in vars(kind()).items() if not name.startswith("_")}
    accepted = {*known, *inspect.signature(kind.__init__).parameters}
    small = {name: size for name, size in SIZES.items() if name in accepted and _is_size(known.get(name))}
    small |= {name: value for name, value in IDS.items() if name in accepted}
    if "is_decoder" in accepted:
        small["is_decoder"] = True
    if "kv_lora_rank" in accepted and "num_key_value_heads" in small:  # latent attention has keys for every head
        small["num_key_value_heads"] = small["num_attention_heads"]
    small |= _layers(known)
    parts = {name: part for name, part in known.items() if hasattr(part, "to_dict") and name.endswith("config")}
    small |= {name: _shrunk(type(part), fields.get(name, {})) for name, part in parts.items()}
    return small | {name: value for name, value in fields.items() if name not in parts}


def _is_size(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _layers(known: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, and their number."""
    lists = {name: known[name] for name in BY_LAYER if isinstance(known.get(name), (list, tuple)) and known[name]}
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=False)))[:MOST_KINDS]
    kinds = kinds if len(kinds) > 1 else 2 * kinds
    columns = zip(*kinds, strict=True)
    found: dict[str, Any] = {name: list(column) for name, column in zip(lists, columns, strict=True)}
    return found | {name: len(kinds) for name in LAYERS if name in known}
