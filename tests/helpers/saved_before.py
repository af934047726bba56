"""Contents and answers of models and linears when an earlier version saved them; tests/data/saved_before keeps them.

That folder was written by torch_int4 0.1.0, before its files moved into rooms, with
`python tests/helpers/saved_before.py FOLDER`. Only public names are used here, so that any version can write such a
folder of its own; files that are kept are never written again, because the point of them is their age.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import torch_int4
from torch_int4 import Int4Linear, Int4Weight, patch

FIELDS = ("codes", "scales", "zeros", "offsets", "perm")
COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, **COMMON}
ODD = {**LLAMA, "hidden_size": 72, "intermediate_size": 104, "head_dim": 18}  # no whole groups: saved in our own form
NEOX = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 1e4},
    **COMMON,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {  # folder: model, its config, options of patch
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA, {}),
    "llama_own_form": (LlamaForCausalLM, LlamaConfig, ODD, {"symmetric": False, "zeros": "float", "head": "int4"}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, NEOX, {"symmetric": False, "kv_cache": "int8"}),
}
LINEARS: dict[str, dict[str, Any]] = {  # what an `Int4Linear` can hold: one of each
    "symmetric": {},
    "zeros_in_order": {"zeros": True, "perm": True},
    "offsets": {"offsets": True, "group_size": -1},
    "int8": {"bits": 8, "zeros": True},
    "nf4": {"codebook": "nf4", "group_size": 64},
    "exponents": {"codebook": "fp4", "exponents": True},
}
ROWS, INPUTS = 21, 75  # two codes share a byte, and the last one stands alone


def outputs(model: Any, prompt: Tensor, fed: Tensor) -> Tensor:
    """Logits `[B, T + S, V]` fp32 of a prompt `[B, T]`, then of the tokens `fed` `[B, S]` one by one over the cache."""
    with torch.no_grad():
        out = model(input_ids=prompt, use_cache=True)
        logits = [out.logits]
        for token in fed.split(1, dim=1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1).float()


def fingerprint(weight: Int4Weight) -> dict[str, Any]:
    """What decides every value of a weight: its form, and {field: dtype, shape and SHA-256 of the bytes}."""
    found: dict[str, Any] = {"bits": weight.bits, "group_size": weight.group_size, "codebook": weight.codebook}
    for name in FIELDS:
        if (tensor := getattr(weight, name)) is not None:
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]
    return found


def fingerprints(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{name: fingerprint} of every int4 linear of a model."""
    return {n: fingerprint(m.to_weight()) for n, m in model.named_modules() if isinstance(m, Int4Linear)}


def float_model(name: str) -> Any:
    """The model, before it is patched."""
    kind, config, fields, _ = MODELS[name]
    torch.manual_seed(len(name))
    model = kind(config(**fields))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases that matter
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def random_linear(name: str) -> Int4Linear:
    """An `Int4Linear` with a bias, of the kind of that name in LINEARS."""
    options = LINEARS[name]
    bits, group = options.get("bits", 4), options.get("group_size", 32)
    g = torch.Generator().manual_seed(len(name))
    per_group = ROWS, 1 if group == -1 else -(-INPUTS // group)
    codes = torch.randint(0, 1 << bits, (ROWS, INPUTS), dtype=torch.uint8, generator=g)
    scales = ((torch.rand(per_group, generator=g) + 0.1) * 0.02).half()
    if options.get("exponents"):
        scales = torch.randint(110, 130, per_group, dtype=torch.uint8, generator=g)
    weight = Int4Weight(codes, scales, group_size=group, bits=bits, codebook=options.get("codebook"))
    if options.get("zeros"):
        weight.zeros = torch.randint(0, 1 << bits, per_group, dtype=torch.uint8, generator=g)
    if options.get("offsets"):
        weight.offsets = (torch.randn(per_group, generator=g) * 0.1).half()
    if options.get("perm"):
        weight.perm = torch.randperm(INPUTS, generator=g)
    return Int4Linear.from_weight(weight.validate(), torch.randn(ROWS, generator=g))


def write(folder: Path) -> None:
    """Saves every model and linear of above in `folder`, with what they hold and answer beside them."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "prompt": torch.randint(2, 99, (2, 12), generator=g),
        "fed": torch.randint(2, 99, (2, 4), generator=g),
        "x": torch.randn(3, INPUTS, generator=g),
    }
    facts: dict[str, Any] = {
        "torch_int4": torch_int4.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "isa": torch.ops.torch_int4.isa(),
        "weights": {},
    }
    for name, (*_, options) in MODELS.items():
        model = patch(float_model(name), **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*own form")
            model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
        tensors[name] = outputs(model, tensors["prompt"], tensors["fed"])
        facts["weights"][name] = fingerprints(model)
    save_file(patch(float_model("llama")).state_dict(), folder / "llama_state_dict.safetensors")
    state = {}
    for name in LINEARS:
        linear = random_linear(name)
        state.update({f"{name}.{key}": value for key, value in linear.state_dict().items()})
        with torch.no_grad():
            tensors[f"linear.{name}"] = linear(tensors["x"])
        facts["weights"][f"linear.{name}"] = fingerprint(linear.to_weight())
    save_file(state, folder / "linears.safetensors")
    save_file(tensors, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
