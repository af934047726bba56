"""TEQ: trained equivalent transformation: a scale per input channel, learned, and folded into the module before.

From arXiv 2310.10944. The scales are trained with Adam through the rounding to nearest of the scaled weights. Where the
paper compares the whole model's output, this compares each block's, which needs memory for one block only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.config import WeightOptions
from torch_int4.recipes.parts.block import Block
from torch_int4.recipes.parts.train import Schedule, fake_quants, folded, rounded, train

FLOAT_TARGETS = True
ALONE: tuple[str, dict[str, Any]] = ("teq+rtn", {})
PRESETS = {"light": Schedule(50, (0.1,)), "default": Schedule(200, (0.05,)), "best": Schedule(1000, (0.02,))}


def transform(block: Block, options: WeightOptions) -> None:
    """Train and fold the scales of a block."""
    quants = fake_quants(block, options)
    logs = [torch.zeros(fold.channels) for fold in block.folds]
    if not logs or not quants or not block.batches:
        return

    def parameters() -> dict[str, Tensor]:
        scales = [(fold, log.exp()) for fold, log in zip(block.folds, logs, strict=True)]
        return rounded(quants, folded(block, scales), lambda i: (quants[i].low, quants[i].high))

    train(block, (logs,), parameters, PRESETS[options.preset], torch.optim.Adam)
    for fold, log in zip(block.folds, logs, strict=True):
        block.fold(fold, log.exp())
