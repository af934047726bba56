"""Prepares: half of the hidden channels of every MLP, those with the larger weights, in new and smaller linears."""

import torch
from torch import nn


@torch.no_grad()
def prepare(model, options):
    for module in list(model.module.modules()):
        if hasattr(module, "down_proj"):
            kept = module.down_proj.weight.norm(dim=0).argsort(descending=True)[: module.down_proj.in_features // 2]
            for name in ("gate_proj", "up_proj"):
                setattr(module, name, _linear(getattr(module, name).weight[kept]))
            module.down_proj = _linear(module.down_proj.weight[:, kept])
    model.module.config.intermediate_size //= 2


def _linear(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.contiguous())
    return linear
