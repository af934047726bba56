"""Models with random weights, made a tensor at a time: no float copy of the whole ever exists.

Values matter to no kernel's speed, but logits have to stay finite and far from denormal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import torch_int4
from torch_int4 import Int4Linear
from torch_int4.evals.bench.points import WeightPoint
from torch_int4.evals.bench.run import random_weight
from torch_int4.evals.bench.shapes import Shape, linears
from torch_int4.weights.arena import Arena, Size
from torch_int4.weights.packed import PackedWeight

SPREAD = 0.02  # standard deviation of weights


def fill(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Gives every parameter of `module` (not of its children) that is on the meta device values in `dtype`."""
    for name, parameter in list(module._parameters.items()):
        if parameter is None or not parameter.is_meta:
            continue
        values = torch.empty(parameter.shape, dtype=dtype)
        if values.dim() >= 2:
            values.normal_(0, SPREAD, generator=generator)
        else:
            values.fill_(0.0 if name == "bias" else 1.0)  # a bias, or the weight of a norm
        module._parameters[name] = nn.Parameter(values, requires_grad=False)


def fill_all(model: Any, dtype: torch.dtype) -> Any:
    """Fills what is left on the meta device, ties what the config ties, and returns the model ready to run."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        fill(module, dtype, generator)
    model.tie_weights()
    model.config.dtype = dtype
    return model.eval()


def dense(shape: Shape, dtype: torch.dtype, context: int) -> Any:
    """A float model of the shape."""
    return fill_all(shape.skeleton(context), dtype)


def int4(shape: Shape, dtype: torch.dtype, context: int, *, group_size: int, **options: Any) -> Any:
    """A patched model of the shape, symmetric int4 with an int8 head; its linears are never float.

    Random codes are drawn once for each shape of a linear and packed for each linear anew, so that every one has
    memory of its own, laid out as after loading a checkpoint.

    Args:
        shape: of the model.
        dtype: of activations, norms and biases; embeddings are bf16.
        context: positions that it must reach.
        group_size: inputs that share a scale.
        **options: further fields of `Int4Config`.
    """
    model = shape.skeleton(context)
    drawn: dict[tuple[int, int], torch_int4.Int4Weight] = {}
    places = list(linears(model))
    memory = Arena(Size(old.out_features, old.in_features, group_size, "int4") for _, old in places)
    for name, old in places:
        size = old.out_features, old.in_features
        if size not in drawn:
            drawn[size] = random_weight(WeightPoint(*size, group_size, "symmetric"))
        bias = None if old.bias is None else torch.zeros(old.out_features, dtype=dtype)
        packed = PackedWeight.pack(drawn[size], memory.take)
        new = Int4Linear(packed, bias, compute=options.get("compute", "int8"), dtype=dtype)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    drawn.clear()
    fill_all(model, dtype)
    return torch_int4.patch(model, group_size=group_size, **{"embeddings": "bf16", **options})
