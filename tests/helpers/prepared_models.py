"""Decoders whose layers are prepared, and harm that is done to their tensors."""

import torch
from decoders import decoder, prompt
from torch import nn

from torch_int4 import Int4Cache, patch
from torch_int4.nn.prepared import layers

OPS = torch.ops.torch_int4


def made(name="llama", dtype=torch.float32, **options):
    """A patched decoder whose layers are prepared, and its logits."""
    model = patch(decoder(name, dtype), head="float", **options)
    before = run(model)
    assert all(layer in layers for layer in blocks(model))
    return model, before


def blocks(model):
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def run(model, tokens=5):
    """Logits of a prompt and of one more token, with our cache."""
    cache = Int4Cache()
    with torch.no_grad():
        first = model(prompt(tokens=tokens), past_key_values=cache).logits
        return torch.cat((first, model(prompt(tokens=1), past_key_values=cache).logits), 1)


def layer(model):
    return model.model.layers[1]


def scattered(model):
    """Gives a linear a permutation and a bias."""
    down = layer(model).mlp.down_proj
    down.perm = torch.arange(down.in_features - 1, -1, -1)
    down.bias = nn.Parameter(torch.ones(down.out_features), requires_grad=False)


# What is done to tensors of the last linear, and what the next call says of it.
HARMS = {
    "perm out of range": ("down.perm.fill_(2**40)", "perm must hold indices"),
    "perm below zero": ("down.perm[5] = -1", "perm must hold indices"),
    "perm emptied": ("down.perm.untyped_storage().resize_(8)", "the storage of perm .* was resized"),
    "codes emptied": ("down.packed.untyped_storage().resize_(0)", "the storage of weight .* was resized"),
    "scales emptied": ("down.packed_scales.untyped_storage().resize_(9)", "the storage of scales .* was resized"),
    "offsets emptied": ("down.packed_offsets.untyped_storage().resize_(9)", "the storage of offsets .* was resized"),
    "bias emptied": ("down.bias.untyped_storage().resize_(0)", "the storage of bias .* was resized"),
    "norm emptied": ("norm.weight.untyped_storage().resize_(0)", "the storage of norm_weight .* was resized"),
    "other codes": ("down.packed.data = torch.zeros(0, dtype=torch.uint8)", "weight has shape"),
    "other scales": ("down.packed_scales.data = down.packed_scales[:1]", "scales has shape"),
    "other type": ("down.packed.data = down.packed.view(torch.int8).clone()", "weight must be uint8"),
    "other strides": ("down.packed.data = down.packed.mT.contiguous().mT", "weight must be contiguous"),
    "other perm": ("down.perm.data = down.perm.int()", "perm must be int64"),
}
