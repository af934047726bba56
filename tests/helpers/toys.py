"""Models for the toy stages in helpers/stages, which the fixture `toy_stages` makes stages of recipes."""

import copy

from tiny_models import int4s, llama

from torch_int4 import recipes

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tied": False}
EXACT = {"compute": "fp32", "kv_cache": "fp32"}


def model_of(**fields):
    """A Llama whose sizes are whole groups."""
    return llama(**{**SIZES, **fields})


def toy(name):
    """A toy stage."""
    return recipes.get(f"toy_{name}")


def dense(float_model, patched):
    """The float model with the matrices that the linears of the patched one stand for, extras included."""
    reference = copy.deepcopy(float_model)
    for name, module in int4s(patched).items():
        reference.get_submodule(name).weight.data = module.dequantize()
        if module.bias is not None:
            reference.get_submodule(name).bias.data = module.bias.data.clone()
    return reference
