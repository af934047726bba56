"""Afterwards: gives the head a low-rank branch, of a correction that is no more than an example."""

import torch

from torch_int4.recipes.toy_low_rank import RANK, LowRank

EXTRAS = {"low_rank": LowRank}


def after(model, options):
    head = model.module.lm_head
    a = torch.zeros(RANK, head.in_features)
    a[0, 0] = 1.0
    model.extend("lm_head", {"low_rank": LowRank(a=a, b=torch.full((head.out_features, RANK), 0.5))})
