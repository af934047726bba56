"""Small random models, and what tests ask about patched ones."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from torch_int4 import Int4Linear

IDS = torch.tensor([[5, 17, 3, 42, 9, 61], [1, 2, 3, 4, 5, 6]])


def llama(tied=True, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 72,  # not a multiple of the group
            "intermediate_size": 104,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 18,
            "vocab_size": 99,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,
            **fields,
        }
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, Int4Linear)}


def int4s(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Int4Linear)}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def dequantized(model, patched):
    """A float copy of the model with the weights that the patched one stands for."""
    reference = copy.deepcopy(model)
    for name, module in int4s(patched).items():
        holder, _, linear = name.rpartition(".")
        experts, _, number = holder.rpartition(".")
        if number.isdigit() and hasattr(reference.get_submodule(experts), "is_transposed"):
            part_of(reference.get_submodule(experts), int(number), linear).copy_(module.to_weight().dequantize())
            continue
        old = reference.get_submodule(name)
        weight = module.to_weight().dequantize().to(old.weight.dtype)
        old.weight = nn.Parameter(weight if isinstance(old, nn.Linear) else weight.t().contiguous())
    return reference


def part_of(experts, number, linear):
    """The view of the weight of one expert's linear, in a stock module that keeps those of all in one tensor."""
    name = linear if linear == "down_proj" or not experts.has_gate else "gate_up_proj"
    weight = getattr(experts, name).data[number]
    weight = weight.t() if experts.is_transposed else weight
    if name != "gate_up_proj":
        return weight
    half, inner = int(linear == "up_proj"), weight.shape[0] // 2
    return weight[half * inner :][:inner] if experts.is_concatenated else weight[half::2]


def assert_same_model(model, patched, **tolerance):
    torch.testing.assert_close(logits(patched), logits(dequantized(model, patched)), **tolerance)


def is_mapped(module):
    """Whether the weight of an int4 linear lies in a file of packed weights."""
    address = module.packed.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split()
        low, high = (int(part, 16) for part in span.split("-"))
        if low <= address < high:
            return len(rest) > 4 and ("partial" in rest[4] or "panels" in rest[4])
    return False
