"""Models for toy stages, and comparisons of what became of them."""

import copy

import torch
from tiny_models import int4s, llama

from torch_int4 import recipes

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tied": False}


EXACT = {"compute": "fp32", "kv_cache": "fp32"}


def model_of(**fields):
    return llama(**{**SIZES, **fields})


def toy(name):
    return recipes.get(f"toy_{name}")


def dense(float_model, patched):
    """The float model with the matrices that the linears of the patched one stand for."""
    reference = copy.deepcopy(float_model)
    for name, module in int4s(patched).items():
        reference.get_submodule(name).weight.data = module.dequantize()
        if module.bias is not None:
            reference.get_submodule(name).bias.data = module.bias.data.clone()
    return reference


def assert_same_bits(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
