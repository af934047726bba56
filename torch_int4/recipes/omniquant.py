"""OmniQuant: learnable clipping of every group's range, and learnable scales that are folded into the module before.

From arXiv 2308.13137. The ends of a range are multiplied by sigmoids of trained numbers, scales are exponentials of
them; AdamW trains both together through the rounding, block by block. In a pair with another stage, "omniquant+gptq"
takes the scales only, and "awq+omniquant" the clipping only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_int4.config import WeightOptions
from torch_int4.recipes import teq
from torch_int4.recipes.parts.block import Block
from torch_int4.recipes.parts.folds import Fold
from torch_int4.recipes.parts.train import FakeQuant, Schedule, fake_quants, folded, rounded, train
from torch_int4.weights.canonical import Int4Weight

FLOAT_TARGETS = True
LEARNS_SCALES = True  # by itself: rounding a block then folds scales too
START = 4.0  # sigmoid(4) = 0.982
PRESETS = {  # rates of the clipping and of the scales
    "light": Schedule(50, (0.2, 0.1)),
    "default": Schedule(200, (0.1, 0.05)),
    "best": Schedule(1000, (0.03, 0.02)),
}


def transform(block: Block, options: WeightOptions) -> None:
    """Learn and fold the scales alone."""
    teq.transform(block, options)


def round(block: Block, options: WeightOptions) -> dict[str, Int4Weight]:
    """Train clipping, and scales where the block has folds left, and return the weights of its 4-bit linears."""
    quants = fake_quants(block, options)
    ends = [(torch.full_like(q.low, START), torch.full_like(q.high, START)) for q in quants]
    logs = [torch.zeros(fold.channels) for fold in block.folds]

    def scales() -> list[tuple[Fold, Tensor]]:
        return [(fold, log.exp()) for fold, log in zip(block.folds, logs, strict=True)]

    def parameters() -> dict[str, Tensor]:
        return rounded(quants, folded(block, scales()), lambda i: (ends[i][0].sigmoid(), ends[i][1].sigmoid()))

    if quants and block.batches:
        leaves = [end for pair in ends for end in pair]
        groups = (leaves, logs) if logs else (leaves,)
        schedule = PRESETS[options.preset]
        schedule = schedule if logs else Schedule(schedule.steps, schedule.rates[:1])
        train(block, groups, parameters, schedule, _adamw)
        for fold, s in scales():
            block.fold(fold, s)
    return _freeze(quants, ends)


def _adamw(leaves: Sequence[Tensor]) -> Any:
    return torch.optim.AdamW(leaves, weight_decay=0.0)


def _freeze(quants: list[FakeQuant], ends: list[tuple[Tensor, Tensor]]) -> dict[str, Int4Weight]:
    return {
        quant.linear.name: quant.freeze(quant.linear.weight.float(), low.sigmoid(), high.sigmoid())
        for quant, (low, high) in zip(quants, ends, strict=True)
    }
