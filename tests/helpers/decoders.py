"""Tiny random decoders of every family that has a file, some variants, and some that have none."""

import copy
from collections import Counter

import torch
from tiny_models import dequantized
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from torch_int4 import patch
from torch_int4.patching import families

COMMON = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
FULL = ["full_attention", "full_attention"]
WINDOW = {"sliding_window": 8}
UNDROPPED = dict.fromkeys(
    (
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "dropout",
        "attention_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    ),
    0.0,
)
OF_FAMILY = {  # what a family needs besides
    "cwm": {"layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "falcon": {"ffn_hidden_size": 96, "alibi": False, "multi_query": True, "parallel_attn": True},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, "layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "gemma2": {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, **WINDOW},
    "gemma3_text": {"query_pre_attn_scalar": 24, "layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "gpt2": {"n_inner": 96, **UNDROPPED},
    "gpt_bigcode": {"n_inner": 96, **UNDROPPED},
    "gpt_neox": {"intermediate_size": 96, "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 1e4}},
    "bamba": {"attn_layer_indices": [0, 1]},
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "key_multiplier": 0.7,
    },
    "gptj": {"rotary_dim": 8},
    "gpt_oss": {**EXPERTS, "layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0, "num_experts": 1, "num_experts_per_tok": 1},
    "lfm2": {"layer_types": FULL, "block_auto_adjust_ff_dim": False},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, **UNDROPPED},
    "granite": {"attention_multiplier": 0.5, "residual_multiplier": 0.6},
    "mpt": {"use_cache": True},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "mistral": WINDOW,
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "biogpt": UNDROPPED,
    "persimmon": {"qk_layernorm": False, **UNDROPPED},
    "qwen3_5_text": {"layer_types": FULL},
    "xglm": {"ffn_dim": 96, "add_cross_attention": False, **UNDROPPED},
    "phi": {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "rope_type": "default"}},
    "phi3": WINDOW,
    "phimoe": {**EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True},
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
CHOSEN = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
SPARSE = {  # models with experts, of families and of none
    "afmoe": {"num_dense_layers": 1},
    "cohere2_moe": {},
    "deepseek_v2": {**CHOSEN, **LATENT},
    "deepseek_v3": {**CHOSEN, **LATENT},
    "dots1": {"n_shared_experts": 1, **CHOSEN},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "flex_olmo": {},
    "glm4_moe": {"use_qk_norm": True, **CHOSEN},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["attention", "attention"], "shared_intermediate_size": 32},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": FULL},
    "minimax": {},
    "olmoe": {},
    "qwen3_5_moe_text": {"layer_types": FULL},
    "qwen3_next": {"layer_types": FULL},
    "qwen3_vl_moe_text": {},
    "solar_open": CHOSEN,
}
NOT_GROUPED = (
    "biogpt",
    "bloom",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "mpt",
    "opt",
    "persimmon",
    "xglm",
)
VARIANTS = {
    "cohere-norms": ("cohere", {"use_qk_norm": True, "logit_scale": 1.0}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96}),
    "falcon-rw": (
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "ffn_hidden_size": 96},
    ),
    "gpt_bigcode-mha": ("gpt_bigcode", {"multi_query": False, "n_inner": 96, **UNDROPPED}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "intermediate_size": 96}),
    "glm4_moe-plain": ("glm4_moe", {**EXPERTS, **CHOSEN, "use_qk_norm": False}),
    "gpt_oss-limits": ("gpt_oss", {**EXPERTS, "swiglu_limit": 0.5, "swiglu_alpha": 1.5}),
    "llama-mha": ("llama", {"num_key_value_heads": 4, "attention_bias": True}),
    "llama-odd": ("llama", {"head_dim": 18, "hidden_size": 72, "intermediate_size": 104}),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        {
            "layer_types": ["attention", "attention"],
            "shared_intermediate_size": 96,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
        },
    ),
    "opt-gelu": ("opt", {"activation_function": "gelu", "ffn_dim": 96, "word_embed_proj_dim": 64, **UNDROPPED}),
    "persimmon-norms": ("persimmon", {"qk_layernorm": True, **UNDROPPED}),
    "stablelm-norms": ("stablelm", {"qk_layernorm": True}),
    "phi-norms": ("phi", {"qk_layernorm": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
}
GENERIC = {
    "jais2": {},
    "nanochat": {},
    "seed_oss": {},
}
FAMILIES = [name for name in families.available() if name != "generic"]
HYBRID = ("falcon_h1",)  # layers with attention and something else besides, which keep states that no `Int4Cache` has
MAIN = ["llama", "gptj", "gpt_neox", "falcon", "falcon-40b", "falcon-rw"]
UNFUSED = [name for name in FAMILIES if not families.resolve(name).attentions]  # of which only linears are known
FUSED = [*(name for name in FAMILIES if name not in (*HYBRID, *UNFUSED)), *VARIANTS]
ALL = [*FUSED, *GENERIC]


def family_of(name):
    return VARIANTS[name][0] if name in VARIANTS else name if name in FAMILIES else "generic"


def decoder(name, dtype=torch.float32):
    """A model whose every parameter matters."""
    family, fields = VARIANTS.get(
        name, (name, {**OF_FAMILY.get(name, {}), **GENERIC.get(name, {}), **SPARSE.get(name, {})})
    )
    shape = {} if family in NOT_GROUPED else GROUPED
    experts = EXPERTS if name in SPARSE or "moe" in family or family == "mixtral" else {}
    kind, config = _configured(family, {**COMMON, **shape, **experts, **fields})
    torch.manual_seed(len(name))
    model = kind.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def _configured(family, fields):
    """The class of models of a family, and a config for it."""
    if "_vl_" not in family:
        return AutoModelForCausalLM, AutoConfig.for_model(family, **fields)
    rotation = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "num_heads": 2, "embed_dim": 32, "intermediate_size": 32, "out_hidden_size": 64}
    parts = {"text_config": {**fields, "rope_parameters": rotation}, "vision_config": {**vision, "hidden_size": 32}}
    return AutoModelForImageTextToText, AutoConfig.for_model(family.removesuffix("_text"), **parts)


def pair(name, **options):
    """A patched decoder, and a float one with stock attention that holds the same weights."""
    model = decoder(name)
    patched = patch(copy.deepcopy(model), **{"compute": "fp32", "kv_cache": "fp32", **options})
    return patched, dequantized(model, patched)


def prompt(rows=2, tokens=12, seed=0):
    return torch.randint(2, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def assert_near(got, want, tolerance):
    """Distance relative to the length of what is wanted."""
    assert torch.isfinite(got).all()
    distance = ((got - want).norm() / want.norm()).item()
    assert distance <= tolerance, distance


class Calls(TorchDispatchMode):
    """Counts calls of our operators that compute."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.prepared = 0  # layers that ran prepared, of which one call may run several

    @property
    def attended(self):
        """Layers whose attention ran in our operators."""
        return self.prepared + self.counts["attention"] + self.counts["decoder_layer"]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torch_int4" and not func._opname.startswith(("prepare_", "release_")):
            self.counts[func._opname] += 1
            self.prepared += len(args[1]) if func._opname == "prepared_decoder_layers" else 0
        return func(*args, **(kwargs or {}))
